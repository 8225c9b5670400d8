"""One clip from start to finish for `cf-generate`: checks, engines, session, file, record."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from causal_forcing.runtime import console
from causal_forcing.runtime.clip_request import ClipRequest, check_request, image_sha256
from causal_forcing.runtime.clip_writer import ClipWriter
from causal_forcing.runtime.engine_lookup import build_engine, find_or_build
from causal_forcing.runtime.environment import LaunchedRank
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.generation_progress import GenerationProgress
from causal_forcing.runtime.manifest import check_files, read_manifest
from causal_forcing.runtime.rank_process import chosen_exchange, decisive
from causal_forcing.runtime.record import ClipRecord

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from causal_forcing.runtime.loading import EngineSet
    from causal_forcing.runtime.process_group import RankGroup
    from causal_forcing.runtime.session import Chunk
    from causal_forcing.runtime.usage import MemoryUse

WARNING_LENGTH = 300
"""Characters of a warning that quotes the prompt."""


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
    image = check_request(request, writes=place is None or place.rank == 0)
    if request.generate.prompt == request.options.variant().default_prompt:
        console.narrate(f"the default prompt: {request.generate.prompt}")
    if place is not None and place.ranks > 1:
        return _make_clip_together(request, place, image)
    folder = request.engine_folder or find_or_build(request.options, request.device)
    try:
        return _generate(request, folder, image)
    except EngineDamagedError:  # before anything was written; one in the cache is built again
        if request.engine_folder is not None:
            raise
    return _generate(request, build_engine(request.options, request.device), image)


def _make_clip_together(request: ClipRequest, place: LaunchedRank, image: npt.NDArray[np.float32] | None) -> ClipRecord:
    """Make one rank's part of a clip; rank 0 alone looks for the engine, writes and talks."""
    from causal_forcing.runtime.process_group import joined, rank_device

    with joined(place) as group:
        group.agree(decisive(request, None if image is None else image_sha256(image)))
        request = dataclasses.replace(request, device=rank_device(request.device, place))
        folder = group.share(lambda: _sound_engine(request))
        group.connect(request.device)
        with chosen_exchange():
            return _generate(request, folder, image, group)


def _sound_engine(request: ClipRequest) -> Path:
    """Return the engine directory once its files are whole, so that no rank is to find one that is not."""
    folder = request.engine_folder or find_or_build(request.options, request.device)
    try:
        check_files(folder, read_manifest(folder), trust_stamps=True)
    except EngineDamagedError:
        if request.engine_folder is not None:
            raise
        return build_engine(request.options, request.device)
    return folder


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
        image_sha256=None if image is None else image_sha256(image),
    )


def _write_clip(
    chunks: Iterator[Chunk], request: ClipRequest, record: ClipRecord, memory: MemoryUse, group: RankGroup | None
) -> None:
    from causal_forcing.runtime.usage import process_age_s

    total_blocks = request.generate.total_blocks
    started_s = time.perf_counter()
    progress = GenerationProgress(total_blocks)
    writer = ClipWriter(record, output_dir=request.output_dir, slug=request.options.slug)
    if group is not None:
        group.monitor.before_leaving = lambda ending: writer.abandon("interrupted" if ending.stopped else "failed")
    # Inside of the writer, which is to know whether the clip was stopped or failed elsewhere.
    with writer, progress, contextlib.nullcontext() if group is None else group.together():
        for chunk in chunks:
            frames = chunk.frames()
            progress.advance(len(frames))
            timing = {
                "first_frame_s": _rounded(progress.first_frame_s),
                "steady_fps": _rounded(progress.fps),
                "generate_s": _rounded(time.perf_counter() - started_s),
            }
            if chunk.index == 0:
                timing["process_to_first_frame_s"] = _rounded(process_age_s())
            if chunk.index <= 1:  # by then everything that a clip needs is allocated
                memory.look()
            writer.add(chunk.index, frames, timing=timing, memory=memory.peaks())
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
