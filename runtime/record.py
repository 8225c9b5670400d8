"""The record of a clip: a JSON file beside it with every resolved option and timing, from which it can be repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from causal_forcing.runtime.config import EngineOptions, GenerateConfig
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
    """Where it ran."""
    output: str
    """The clip."""
    fps: int
    """Playback rate."""
    image_sha256: str | None = None
    """Hash of the conditioning image's pixels as the engine got them."""
    status: str = "running"
    """running, complete, interrupted or failed."""
    blocks: int = 0
    """Chunks handed out."""
    frames: int = 0
    """Pixel frames written."""
    frames_sha256: str | None = None
    """Hash over all frames, 8-bit RGB: equal for a clip that is repeated bit for bit."""
    timing: dict[str, float | None] = field(default_factory=dict)
    """Seconds: engine loading, first frame, all; and steady frames a second."""
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
        return ClipRecord(**content)
    except TypeError as error:
        raise RecordError(f"record {path} lacks or misnames a field ({error}): generate the clip anew") from error


def recorded_options(record: ClipRecord) -> tuple[EngineOptions, GenerateConfig]:
    """Return the options that repeat a record's clip.

    Raises:
        RecordError: A field is not one of ours.
    """
    try:
        options = dict(record.engine_options)
        for name in ("checkpoint", "wan_folder"):
            options[name] = None if options.get(name) is None else Path(options[name])
        return EngineOptions(**options), GenerateConfig(**record.generate)
    except TypeError as error:
        raise RecordError(f"the record names an option that is not one ({error}): generate the clip anew") from error


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
