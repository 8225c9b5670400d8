"""One clip from start to finish for `cf-generate`: checks, engines, session, file, record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from causal_forcing.runtime import console
from causal_forcing.runtime.config import EngineOptions, GenerateConfig
from causal_forcing.runtime.errors import CausalForcingError, EngineNotFoundError, ImageError
from causal_forcing.runtime.image import ImageFit, load_image
from causal_forcing.runtime.manifest import MANIFEST_NAME, read_manifest
from causal_forcing.runtime.record import ClipRecord, FrameHash
from causal_forcing.runtime.resolution import check_fits, default_root, resolve_engine, weights_identity
from causal_forcing.runtime.video import check_writable, open_sink

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from causal_forcing.runtime.session import VideoSession


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRequest:
    """Everything that `cf-generate` was asked for."""

    options: EngineOptions
    """Which engine."""
    generate: GenerateConfig
    """Which clip."""
    output: str
    """An mp4 file, or a folder for PNG frames."""
    fps: int
    """Playback rate."""
    device: str = "auto"
    """Where to run."""
    engine_folder: Path | None = None
    """An engine directory to use as it is; None finds or builds one."""

    def record_path(self) -> Path:
        """Return where the record goes: `clip.json` beside `clip.mp4`."""
        return Path(self.output.rstrip("/")).with_suffix(".json")


def make_clip(request: ClipRequest) -> ClipRecord:
    """Generate a clip, writing it as it comes.

    Raises:
        CausalForcingError: Anything that the user can set right; nothing was written unless generation had begun.
        KeyboardInterrupt: Stopped by the user; the clip so far and its record are whole.
    """
    image = _check(request)
    folder = request.engine_folder or find_or_build(request.options, request.device)
    started_s = time.perf_counter()
    from causal_forcing.runtime.loading import load_engines
    from causal_forcing.runtime.session import VideoSession

    engines = load_engines(folder, device=request.device)
    config = engines.manifest.config
    with VideoSession(engines) as session:
        record = ClipRecord(
            engine_options=json.loads(json.dumps(dataclasses.asdict(request.options), default=str)),
            engine=str(folder),
            engine_fingerprint=config.fingerprint(),
            engine_config=config.fields(),
            generate=dataclasses.asdict(request.generate),
            device=str(engines.device),
            output=request.output,
            fps=request.fps,
            image_sha256=None if image is None else hashlib.sha256(image.tobytes()).hexdigest(),
            timing={"load_s": round(time.perf_counter() - started_s, 3)},
        )
        if config.weights.startswith("random:"):
            console.narrate(f"{config.variant.slug} has random weights: the pictures are noise")
        _write_clip(session, request, record, image)
    return record


def find_or_build(options: EngineOptions, device: str) -> Path:
    """Return the directory of the engine for these options, building it where it is not there.

    The build runs in a process of its own: this program loads no model code and keeps none of its memory.

    Raises:
        CausalForcingError: The build failed; it has said why.
    """
    weights = weights_identity(options)
    if weights is not None:
        folder = resolve_engine(options, weights=weights, device=device).folder(default_root())
        if (folder / MANIFEST_NAME).exists():
            return folder
        console.narrate(f"no engine for {options.slug} with these options yet: building it once")
    command = [sys.executable, "-m", "causal_forcing.build_engines.cli", *_build_arguments(options), "--device", device]
    finished = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        failure = CausalForcingError(f"the engine could not be built: cf-build {options.slug} failed, see above")
        failure.exit_code = finished.returncode
        raise failure
    return Path(json.loads(finished.stdout)["engine"])


def recorded_engine(record: ClipRecord) -> Path | None:
    """Return the engine directory that made a record's clip, if it is still there and the same."""
    folder = Path(record.engine)
    try:
        same = read_manifest(folder).config.fingerprint() == record.engine_fingerprint
    except CausalForcingError:
        return None
    return folder if same else None


def _build_arguments(options: EngineOptions) -> list[str]:
    arguments = [options.slug]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "slug" and value is not None:
            arguments += [f"--{field.name.replace('_', '-')}", str(value)]
    return arguments


def _check(request: ClipRequest) -> npt.NDArray[np.float32] | None:
    """Find what is wrong with the request before anything is built, loaded or written; returns the image."""
    options, generate = request.options, request.generate
    variant = options.variant()
    geometry = options.geometry()
    check_writable(request.output)
    if request.engine_folder is not None:
        if not request.engine_folder.is_dir():
            raise EngineNotFoundError(
                f"no engine directory {request.engine_folder}: leave out --engine, or run: cf-build {options.slug}"
            )
        manifest = read_manifest(request.engine_folder)
        check_fits(manifest, options)
        geometry = manifest.config.geometry
    if variant.takes_image and generate.image is None:
        raise ImageError(f"{variant.slug} starts from an image and none was given: add --image-path FILE")
    if generate.image is None:
        return None
    if not variant.takes_image:
        raise ImageError(f"{variant.slug} makes video from text alone: leave out --image-path, or use an i2v slug")
    return load_image(
        generate.image,
        pixel_height=geometry.pixel_height,
        pixel_width=geometry.pixel_width,
        resize=ImageFit(generate.image_fit),
    )


def _write_clip(
    session: VideoSession, request: ClipRequest, record: ClipRecord, image: npt.NDArray[np.float32] | None
) -> None:
    total_blocks = request.generate.total_blocks
    hashed = FrameHash()
    started_s = time.perf_counter()
    with _prompt_warnings():
        chunks = session.generate(
            request.generate.prompt, total_blocks=total_blocks, seed=request.generate.seed, image=image
        )
    progress = console.GenerationProgress(total_blocks)
    try:
        with open_sink(request.output, fps=request.fps) as sink, progress:
            for chunk in chunks:
                frames = chunk.frames()
                sink.write(frames)
                hashed.update(frames)
                record.blocks, record.frames = chunk.index + 1, sink.frames_written
                progress.advance(len(frames))
                if chunk.index == 0:
                    record.write(request.record_path())
                if chunk.index + 1 == total_blocks:
                    break  # asking for one more would run the last chunk's context pass, which nothing needs
        record.status = "complete"
    except KeyboardInterrupt:
        record.status = "interrupted"
        raise
    except BaseException:
        record.status = "failed"
        raise
    finally:
        if record.frames:
            record.frames_sha256 = hashed.hexdigest()
            record.timing |= {
                "first_frame_s": _rounded(progress.first_frame_s),
                "steady_fps": _rounded(progress.fps),
                "generate_s": _rounded(time.perf_counter() - started_s),
            }
            record.write(request.record_path())
            if record.status != "complete":
                console.narrate(f"kept the clip so far: {record.frames} frames in {request.output}")


@contextmanager
def _prompt_warnings() -> Iterator[None]:
    """Say a session's warnings about the prompt in the program's own way."""
    from causal_forcing.runtime.session import PromptTruncated

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptTruncated)
        yield
    for warning in caught:
        if issubclass(warning.category, PromptTruncated):
            console.warn(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
