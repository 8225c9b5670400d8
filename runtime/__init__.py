"""Engines to frames: load, cache, denoise, decode, hand out.

    from causal_forcing.runtime import EngineOptions, VideoSession, find_or_build, load_engines

    folder = find_or_build(EngineOptions(slug="tiny"), device="auto")
    with VideoSession(load_engines(folder)) as session:
        for chunk in session.generate("a paper boat on a rainy street", total_blocks=7):
            frames = chunk.frames()  # uint8 [T, H, W, 3], RGB

The names in `__all__` are the public ones. Each is imported when it is first asked for: `import causal_forcing.runtime`
imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from causal_forcing.runtime.clip import make_clip
    from causal_forcing.runtime.clip_request import ClipRequest
    from causal_forcing.runtime.config import GenerateConfig
    from causal_forcing.runtime.engine_lookup import find_or_build
    from causal_forcing.runtime.engine_options import EngineOptions
    from causal_forcing.runtime.errors import (
        BackendUnavailableError,
        BuildLockedError,
        CausalForcingError,
        CheckpointError,
        EngineDamagedError,
        EngineMismatchError,
        EngineNotFoundError,
        ImageError,
        OutputError,
        PlanError,
        PromptError,
        RanksEndedError,
        RecordError,
        RequirementError,
        TensorRTError,
        UnknownNameError,
        UsageError,
        WeightsMissingError,
    )
    from causal_forcing.runtime.frame_sink import FrameSink, open_sink
    from causal_forcing.runtime.image import ImageFit, load_image
    from causal_forcing.runtime.loading import EngineSet, load_engines
    from causal_forcing.runtime.noise import GivenNoise, NoiseSource, SeededNoise
    from causal_forcing.runtime.prompt_cache import PromptCache, PromptNotKept
    from causal_forcing.runtime.record import ClipRecord
    from causal_forcing.runtime.session import Chunk, PromptTruncated, VideoSession

__all__ = [
    "BackendUnavailableError",
    "BuildLockedError",
    "CausalForcingError",
    "CheckpointError",
    "Chunk",
    "ClipRecord",
    "ClipRequest",
    "EngineDamagedError",
    "EngineMismatchError",
    "EngineNotFoundError",
    "EngineOptions",
    "EngineSet",
    "FrameSink",
    "GenerateConfig",
    "GivenNoise",
    "ImageError",
    "ImageFit",
    "NoiseSource",
    "OutputError",
    "PlanError",
    "PromptCache",
    "PromptError",
    "PromptNotKept",
    "PromptTruncated",
    "RanksEndedError",
    "RecordError",
    "RequirementError",
    "SeededNoise",
    "TensorRTError",
    "UnknownNameError",
    "UsageError",
    "VideoSession",
    "WeightsMissingError",
    "find_or_build",
    "load_engines",
    "load_image",
    "make_clip",
    "open_sink",
]

_HOMES = {
    "clip": ("make_clip",),
    "clip_request": ("ClipRequest",),
    "config": ("GenerateConfig",),
    "engine_lookup": ("find_or_build",),
    "engine_options": ("EngineOptions",),
    "frame_sink": ("FrameSink", "open_sink"),
    "image": ("ImageFit", "load_image"),
    "loading": ("EngineSet", "load_engines"),
    "noise": ("GivenNoise", "NoiseSource", "SeededNoise"),
    "prompt_cache": ("PromptCache", "PromptNotKept"),
    "record": ("ClipRecord",),
    "session": ("Chunk", "PromptTruncated", "VideoSession"),
}
"""Module to the public names that it holds; `errors` holds all others."""

if not TYPE_CHECKING:  # a checker that saw it would take any name for public

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = next((home for home, names in _HOMES.items() if name in names), "errors")
        return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
