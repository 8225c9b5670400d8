"""The record of a clip: a JSON file beside it with every resolved option and timing, from which it can be repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from causal_forcing.runtime.config import GenerateConfig
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import OutputError, RecordError

RECORD_VERSION = 1


@dataclass(kw_only=True)
class ClipRecord:
    """What a clip was made from, and how it went."""

    engine_options: dict[str, Any]
    """The engine options that were given."""
    engine: str
    """The engine directory."""
    engine_fingerprint: str
    """Its fingerprint."""
    engine_config: dict[str, Any]
    """Its complete configuration."""
    generate: dict[str, Any]
    """The complete generation options."""
    device: str
    """Where it ran; with several ranks the first one's."""
    output: str
    """The clip."""
    fps: int
    """Playback rate."""
    ranks: int = 1
    """Processes that made it together, each on a device of its own."""
    image_sha256: str | None = None
    """Hash of the conditioning image's pixels as the engine got them."""
    status: str = "running"
    """running, complete, interrupted or failed."""
    blocks: int = 0
    """Chunks that are in the clip, whole."""
    frames: int = 0
    """Their pixel frames."""
    frames_sha256: str | None = None
    """Hash over all frames, 8-bit RGB: equal for a clip that is repeated bit for bit."""
    timing: dict[str, float | None] = field(default_factory=dict)
    """Seconds: loading; the prompt's embedding; from then to the first frame, and to the last; from the process's start
    to the first frame. And steady frames a second."""
    prompt_source: str | None = None
    """Where the prompt's embedding came from: encoded, by the text encoder, or cached, without it."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peaks in bytes: of the process on the host; on a GPU of all that was seen in use there, and of torch."""
    record_version: int = RECORD_VERSION
    """Layout of this file."""

    def write(self, path: Path) -> None:
        """Write the record; the file is whole at any moment.

        Raises:
            OutputError: It cannot be written.
        """
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError(f"cannot write the record {path}: {error.strerror or error}") from error

    def summary(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dataclasses.asdict(self)


def read_record(path: Path) -> ClipRecord:
    """Read a clip's record.

    Raises:
        RecordError: It is missing, is no record, or is one of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"record {path} does not exist: name the .json file beside a clip") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"record {path} is not readable JSON ({error}): name the .json file beside a clip") from error
    version = content.get("record_version") if isinstance(content, dict) else None
    if version != RECORD_VERSION:
        raise RecordError(
            f"{path} is no clip record of version {RECORD_VERSION}, got {version}: name a clip's .json file"
        )
    try:
        record = ClipRecord(**content)
    except TypeError as error:
        raise RecordError(f"record {path} lacks or misnames a field ({error}): generate the clip anew") from error
    _check_types(record, f"record {path}")
    return record


def recorded_options(record: ClipRecord) -> tuple[EngineOptions, GenerateConfig]:
    """Return the options that repeat a record's clip: as far as it got, with the engine spelled out.

    Raises:
        RecordError: A field is not one of ours.
        UsageError: An option's value is none that it can have.
    """
    given, config = dict(record.engine_options), record.engine_config
    try:
        for name in ("checkpoint", "wan_folder", "taehv"):
            given[name] = None if given.get(name) is None else Path(given[name])
        # Where the engine was named by its folder, only its own configuration says which one it was.
        for name in ("pixel_height", "pixel_width", "window_frames", "sink_frames"):
            given[name] = config["geometry"][name]
        for name in ("backend", "precision", "decoder"):
            given[name] = config[name]
        if record.ranks > 1:
            given["context_parallel"] = record.ranks
        if config["weights"].startswith("random:"):
            given["random_weights"] = int(config["weights"].removeprefix("random:"))
        options = EngineOptions(**given | {"slug": config["variant"]["slug"]})
        generate = GenerateConfig(**record.generate | {"total_blocks": record.blocks})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RecordError(f"the record names an option that is not one ({error}): generate the clip anew") from error
    _check_types(options, "the record's engine_options")
    _check_types(generate, "the record's generate")
    return options, generate


def record_path(output: str) -> Path:
    """Return where the record of a clip goes: `clip.json` beside `clip.mp4`, `frames.json` beside `frames/`.

    Raises:
        OutputError: There is nothing that it could lie beside.
    """
    path = Path(output)
    if not path.name or path.name == "..":
        path = Path(os.path.abspath(output))
    if not path.name:
        raise OutputError(f"cannot write the record of {output}: it has no folder to lie in; name another output")
    if path.suffix.lower() == ".mp4" and not output.endswith("/"):
        return path.with_suffix(".json")
    return path.with_name(f"{path.name}.json")


def check_record_path(output: str) -> None:
    """Find out whether a clip's record can be written, without losing anything that is not one.

    Raises:
        OutputError: It cannot.
    """
    path = record_path(output)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write the record {path}: {path.parent} is not writable; name another output")
    if path.is_dir():
        raise OutputError(f"cannot write the record {path}: it is a folder; name another output")
    if os.path.lexists(path):
        try:
            read_record(path)
        except RecordError:
            raise OutputError(
                f"cannot write the record {path}: the file there is no clip record and would be lost; name another "
                "output, or move that file"
            ) from None


def _check_types(instance: ClipRecord | EngineOptions | GenerateConfig, what: str) -> None:
    """Check that every field of a dataclass holds what its annotation says; JSON may hold anything."""
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not any(isinstance(value, get_origin(kind) or kind) for kind in kinds):
            raise RecordError(f"{what} has {value!r} for {name}, expected {hint}: generate the clip anew")


class FrameHash:
    """Hashes frames as they are handed out."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, frames: npt.NDArray[np.uint8]) -> None:
        """Add frames [T, H, W, 3]."""
        self._digest.update(np.ascontiguousarray(frames).data)

    def hexdigest(self) -> str:
        """Return the hash so far."""
        return self._digest.hexdigest()
