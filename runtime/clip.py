"""One clip from start to finish for `cf-generate`: checks, engines, session, file, record."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
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
from causal_forcing.runtime.clip_writer import ClipWriter
from causal_forcing.runtime.config import (
    TEXT_ENCODER_USES,
    EngineOptions,
    GenerateConfig,
    LaunchedRank,
)
from causal_forcing.runtime.errors import (
    CausalForcingError,
    EngineDamagedError,
    EngineMismatchError,
    EngineNotFoundError,
    ImageError,
    OutputError,
    RecordError,
    UnknownNameError,
    UsageError,
)
from causal_forcing.runtime.frame_output import check_writable
from causal_forcing.runtime.image import ImageFit, load_image
from causal_forcing.runtime.launch import environment_without_ranks
from causal_forcing.runtime.manifest import check_files, read_manifest
from causal_forcing.runtime.rank_process import decisive
from causal_forcing.runtime.record import ClipRecord, check_record_path
from causal_forcing.runtime.resolution import check_fits, default_root, resolve_engine, weights_identity

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from causal_forcing.runtime.loading import EngineSet
    from causal_forcing.runtime.process_group import RankGroup
    from causal_forcing.runtime.session import Chunk
    from causal_forcing.runtime.usage import MemoryUse

BUILD_STOP_S = 30.0
"""How long a build that was asked to stop may take to clean up."""
SIGNAL_POLL_S = 0.5
"""How often a program that waits for a build looks for signals."""
WARNING_LENGTH = 300
"""Characters of a warning that quotes the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRequest:
    """Everything that `cf-generate` was asked for."""

    options: EngineOptions
    """Which engine."""
    generate: GenerateConfig
    """Which clip."""
    output: str | None = None
    """An mp4 file, or a folder for PNG frames; None takes a free name in `output_dir`."""
    output_dir: Path = Path("outputs")
    """Folder of clips without `output`; it is made if it is not there."""
    fps: int
    """Playback rate."""
    device: str = "auto"
    """Where to run."""
    engine_folder: Path | None = None
    """An engine directory to use as it is; None finds or builds one."""
    image_sha256: str | None = None
    """What the image must hash to, as the engine gets it; None takes any."""
    text_encoder: str = "free"
    """What becomes of the text encoder once the prompt is encoded: free or keep."""
    prompt_cache: bool = True
    """Whether the prompt's embedding is looked for, and kept, on disk."""

    def __post_init__(self) -> None:
        if self.text_encoder not in TEXT_ENCODER_USES:
            raise UnknownNameError("use of the text encoder", self.text_encoder, TEXT_ENCODER_USES)


def make_clip(request: ClipRequest, place: LaunchedRank | None = None) -> ClipRecord:
    """Generate a clip, writing it as it comes.

    Args:
        request: What was asked for.
        place: This process's place among those that make the clip together; None makes it alone.

    Returns:
        The clip's record; on ranks other than 0 one that was written nowhere.

    Raises:
        CausalForcingError: Anything that the user can set right; nothing was written unless generation had begun.
        KeyboardInterrupt: Stopped by the user; the clip so far and its record are whole.
    """
    if place is not None and place.ranks > 1:
        return _make_clip_together(request, place)
    image = _check(request)
    if request.generate.prompt == request.options.variant().default_prompt:
        console.narrate(f"the default prompt: {request.generate.prompt}")
    folder = request.engine_folder or find_or_build(request.options, request.device)
    try:
        return _generate(request, folder, image)
    except EngineDamagedError:  # before anything was written; one in the cache is built again
        if request.engine_folder is not None:
            raise
    return _generate(request, _build(request.options, request.device), image)


def _make_clip_together(request: ClipRequest, place: LaunchedRank) -> ClipRecord:
    """Make one rank's part of a clip; rank 0 alone looks for the engine, writes and talks."""
    image = _check(request, writes=place.rank == 0)
    if place.rank == 0 and request.generate.prompt == request.options.variant().default_prompt:
        console.narrate(f"the default prompt: {request.generate.prompt}")
    from causal_forcing.runtime.process_group import joined, rank_device

    with joined(place) as group:
        group.agree(decisive(request, None if image is None else _image_sha256(image)))
        request = dataclasses.replace(request, device=rank_device(request.device, place))
        folder = group.share(lambda: _sound_engine(request))
        group.connect(request.device)
        return _generate(request, folder, image, group)


def _sound_engine(request: ClipRequest) -> Path:
    """Return the engine directory once its files are whole, so that no rank is to find one that is not."""
    folder = request.engine_folder or find_or_build(request.options, request.device)
    try:
        check_files(folder, read_manifest(folder), trust_stamps=True)
    except EngineDamagedError:
        if request.engine_folder is not None:
            raise
        return _build(request.options, request.device)
    return folder


def find_or_build(options: EngineOptions, device: str) -> Path:
    """Return the directory of the engine for these options, building it where it is not there.

    The build runs in a process of its own: this program loads no model code and keeps none of its memory.

    Raises:
        CausalForcingError: The build failed; it has said why.
    """
    weights = weights_identity(options)
    if weights is not None:
        folder = resolve_engine(options, weights=weights, device=device).folder(default_root())
        try:
            read_manifest(folder)
        except EngineNotFoundError:
            console.narrate(f"no engine for {options.slug} with these options yet: building it once")
        except (EngineDamagedError, EngineMismatchError):
            pass  # the build says what is wrong with the one that is there
        else:
            return folder
    return _build(options, device)


def recorded_engine(record: ClipRecord) -> Path | None:
    """Return the engine directory that made a record's clip, if it is still there and the same."""
    folder = Path(record.engine)
    try:
        same = read_manifest(folder).config.fingerprint() == record.engine_fingerprint
    except CausalForcingError:
        return None
    return folder if same else None


def _build(options: EngineOptions, device: str) -> Path:
    """Run `cf-build`, and pass a stop on to it: it removes what it has begun."""
    command = [sys.executable, "-m", "causal_forcing.build_engines.cli", *_build_arguments(options)]
    # In a group of its own, Ctrl-C reaches the build once, through this program, however it came.
    build = subprocess.Popen(
        [*command, "--device", device, "--json"],
        env=environment_without_ranks(),
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        result = _output_of(build)
    except BaseException:
        console.narrate("stopping the build")
        build.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            build.wait(BUILD_STOP_S)
        build.kill()
        raise
    if build.returncode:
        failure = CausalForcingError(f"the engine could not be built: cf-build {options.slug} failed, see above")
        failure.exit_code, failure.said = build.returncode, True
        if build.returncode < 0:  # nobody had the time to say so
            name = signal.Signals(-build.returncode).name
            failure = CausalForcingError(f"the build was killed by {name}: is there enough memory? run it again")
            failure.exit_code = 3
        raise failure
    return Path(json.loads(result)["engine"])


def _output_of(build: subprocess.Popen[str]) -> str:
    """Wait for a build, and see to signals meanwhile: one that another thread received ends no system call here."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return build.communicate(timeout=SIGNAL_POLL_S)[0]


def _build_arguments(options: EngineOptions) -> list[str]:
    arguments = [options.slug]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "slug" and value is not None:
            values = value if isinstance(value, list) else (value,)
            arguments += [f"--{field.name.replace('_', '-')}={one}" for one in values]
    return arguments


def _check(request: ClipRequest, *, writes: bool = True) -> npt.NDArray[np.float32] | None:
    """Find what is wrong with the request before anything is built, loaded or written; returns the image.

    What needs no framework comes first, so that most refusals are instant.
    """
    options, generate = request.options, request.generate
    variant = options.variant()
    geometry = options.geometry()
    if writes:
        _check_output(request)
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
    if generate.image is not None and not variant.takes_image:
        raise ImageError(f"{variant.slug} makes video from text alone: leave out --image-path, or use an i2v slug")
    image = None
    if generate.image is not None:
        image = load_image(
            generate.image,
            pixel_height=geometry.pixel_height,
            pixel_width=geometry.pixel_width,
            resize=ImageFit(generate.image_fit),
        )
        if request.image_sha256 not in (None, _image_sha256(image)):
            raise RecordError(f"the image {generate.image} is not the record's any more: bring back the one it was")
    if request.engine_folder is None:
        resolve_engine(options, weights="", device=request.device)
    return image


def _check_output(request: ClipRequest) -> None:
    if request.output is not None:
        if not request.output.strip():
            raise UsageError("--output is empty: name an .mp4 file, or a folder for PNG frames")
        check_writable(request.output)
        check_record_path(request.output)
        return
    # What would be made first: the nearest folder that is there must take it.
    folder = Path(os.path.abspath(request.output_dir))
    while not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        what = "is not writable" if os.path.isdir(folder) else "is no folder"
        raise OutputError(f"cannot write into {request.output_dir}: {folder} {what}; choose another --output-dir")


def _image_sha256(image: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _generate(
    request: ClipRequest, folder: Path, image: npt.NDArray[np.float32] | None, group: RankGroup | None = None
) -> ClipRecord:
    from causal_forcing.runtime.loading import load_engines
    from causal_forcing.runtime.prompt_cache import PromptCache
    from causal_forcing.runtime.session import VideoSession
    from causal_forcing.runtime.usage import MemoryUse

    started_s = time.perf_counter()
    engines = load_engines(folder, device=request.device, text_encoder=request.text_encoder)
    memory = MemoryUse(engines.device)
    with VideoSession(engines, prompt_cache=PromptCache() if request.prompt_cache else None) as session:
        loaded_s = time.perf_counter()
        memory.look()
        with _prompt_warnings():
            chunks = session.generate(
                request.generate.prompt,
                total_blocks=request.generate.total_blocks,
                seed=request.generate.seed,
                image=image,
            )
        record = _new_record(request, engines, image)
        record.prompt_source = session.prompt_source
        record.timing |= {
            "load_s": _rounded(loaded_s - started_s),
            "prompt_s": _rounded(time.perf_counter() - loaded_s),
        }
        if group is None or group.is_first:
            _write_clip(chunks, request, record, memory, group)
        else:
            _follow_clip(chunks, request)
    return record


def _follow_clip(chunks: Iterator[Chunk], request: ClipRequest) -> None:
    """Do this rank's part of every chunk; where its frames go is rank 0's. The session keeps the host in step."""
    for chunk in chunks:
        if chunk.index + 1 == request.generate.total_blocks:
            break


def _new_record(request: ClipRequest, engines: EngineSet, image: npt.NDArray[np.float32] | None) -> ClipRecord:
    config = engines.manifest.config
    if config.weights.startswith("random:"):
        console.narrate(f"{config.variant.slug} has random weights: the pictures are noise")
    return ClipRecord(
        engine_options=json.loads(json.dumps(dataclasses.asdict(request.options), default=str)),
        engine=os.path.abspath(engines.folder),
        engine_fingerprint=config.fingerprint(),
        engine_config=config.fields(),
        generate=dataclasses.asdict(request.generate),
        device=str(engines.device),
        ranks=request.options.ranks,
        output=request.output or "",
        fps=request.fps,
        image_sha256=None if image is None else _image_sha256(image),
    )


def _write_clip(
    chunks: Iterator[Chunk], request: ClipRequest, record: ClipRecord, memory: MemoryUse, group: RankGroup | None
) -> None:
    from causal_forcing.runtime.usage import process_age_s

    total_blocks = request.generate.total_blocks
    started_s = time.perf_counter()
    progress = console.GenerationProgress(total_blocks)
    writer = ClipWriter(record, output_dir=request.output_dir, slug=request.options.slug)
    if group is not None:
        group.monitor.before_leaving = lambda ending: writer.abandon("interrupted" if ending.stopped else "failed")
    # Inside of the writer, which is to know whether the clip was stopped or failed elsewhere.
    with writer, progress, contextlib.nullcontext() if group is None else group.together():
        for chunk in chunks:
            frames = chunk.frames()
            if chunk.index == 0:
                record.timing["process_to_first_frame_s"] = _rounded(process_age_s())
            writer.add(chunk.index, frames)
            progress.advance(len(frames))
            if chunk.index <= 1:  # by then everything that a clip needs is allocated
                memory.look()
            record.memory = memory.peaks()
            record.timing |= {
                "first_frame_s": _rounded(progress.first_frame_s),
                "steady_fps": _rounded(progress.fps),
                "generate_s": _rounded(time.perf_counter() - started_s),
            }
            if chunk.index + 1 == total_blocks:
                break  # asking for one more would run the last chunk's context pass, which nothing needs


@contextmanager
def _prompt_warnings() -> Iterator[None]:
    """Say a session's warnings about the prompt in the program's own way."""
    from causal_forcing.runtime.prompt_cache import PromptNotKept
    from causal_forcing.runtime.session import PromptTruncated

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptTruncated)
        warnings.simplefilter("always", PromptNotKept)
        yield
    for warning in caught:
        if issubclass(warning.category, PromptTruncated | PromptNotKept):
            text = str(warning.message)
            console.warn(text if len(text) <= WARNING_LENGTH else f"{text[:WARNING_LENGTH]} …")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
