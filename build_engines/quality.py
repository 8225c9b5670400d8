"""The quality gate: what an engine's clips show, beside what the reference engine's show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from causal_forcing.build_engines.shapes.evaluation import (
    Case,
    Frames,
    Scores,
    held_out_cases,
    make_clips,
    misses,
    score,
    steady_fps,
)
from causal_forcing.build_engines.shapes.world import FRAME_PIXELS
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.loading import load_engines
from causal_forcing.runtime.manifest import read_manifest
from causal_forcing.runtime.model_spec import SHAPES
from causal_forcing.runtime.session import VideoSession
from causal_forcing.runtime.variant import VARIANTS

DEFAULT_PROMPTS = 48
"""Held-out prompts that are compared where nobody says how many."""

TOLERATED_PROMPTS = 2
"""How many right answers an engine may have fewer than the reference.

Both get the same prompts and the same noise, so that they differ only where an engine's errors changed a picture, and
a borderline clip falls to one side as often as to the other. Of 48 prompts that is 4 %: an engine that spoils one clip
in eight is caught 19 times in 20. Of all 141 it is 1.4 %, and one in twenty is caught as surely.
"""

HIGHEST_PSNR_DB = 100.0
"""PSNR of two clips that are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineQuality:
    """What one engine's clips show."""

    name: str
    """Backend and precision."""
    scores: Scores
    """Answers to the prompts."""
    steady_fps: float
    """Frames a second after a clip's first chunk, decoding included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """An engine beside the reference."""

    engine: EngineQuality
    """The engine that was asked about."""
    reference: EngineQuality | None
    """The reference; None where the engine is that itself."""
    psnr_db: float | None
    """Mean over clips of the PSNR between both engines' frames."""
    failures: list[str]
    """What is not good enough, in words."""
    reference_misses: list[str]
    """What the reference itself lacks of the wanted scores, in words."""


def check_measurable(options: EngineOptions) -> None:
    """Check that what an engine makes can be measured.

    Raises:
        UsageError: It makes something else than the shapes, or frames of another size, or needs several processes.
    """
    if options.ranks > 1:
        raise UsageError(
            f"--quality makes clips in one process, got --context-parallel {options.ranks}: leave it out; every number "
            "of ranks makes the same clips"
        )
    if options.variant().model != SHAPES:
        slugs = ", ".join(variant.slug for variant in VARIANTS.values() if variant.model == SHAPES)
        raise UsageError(f"--quality is measured on moving shapes, which {options.slug} does not make: use {slugs}")
    size = (options.geometry().pixel_height, options.geometry().pixel_width)
    if size != (FRAME_PIXELS, FRAME_PIXELS):
        raise UsageError(
            f"--quality is measured at {FRAME_PIXELS}×{FRAME_PIXELS}, not at {size[0]}×{size[1]}: leave out "
            "--pixel-height and --pixel-width"
        )


def choose_cases(prompts: int | None) -> list[Case]:
    """Return the prompts to compare.

    Raises:
        UsageError: There are not as many.
    """
    cases = held_out_cases()
    count = DEFAULT_PROMPTS if prompts is None else prompts
    if not 1 <= count <= len(cases):
        raise UsageError(f"--prompts {count} is out of range: use a number from 1 to {len(cases)}")
    return cases[:count]


def reference_options(options: EngineOptions) -> EngineOptions:
    """Return the options of the reference engine: torch in fp32, and all else the same."""
    return replace(options, backend="torch", precision="fp32")


def compare_quality(
    folder: Path,
    reference: Path,
    cases: Sequence[Case],
    *,
    device: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
) -> QualityReport:
    """Score an engine's clips and compare them with the reference's, or with what is wanted of the reference itself.

    Args:
        folder: Engine directory of a `shapes` slug at 128×128.
        reference: Engine directory of the reference; the same one where the engine is that.
        cases: Prompts to compare.
        device: Where both run.
        progress: Told what begins.

    Raises:
        CausalForcingError: An engine cannot be loaded.
    """
    progress(f"{len(cases)} clips with the engine")
    clips, engine = _measure(folder, cases, device)
    variant = read_manifest(folder).config.variant
    if folder == reference:
        return QualityReport(
            engine=engine,
            reference=None,
            psnr_db=None,
            failures=misses(engine.scores, variant),
            reference_misses=misses(engine.scores, variant),
        )
    progress(f"{len(cases)} clips with the reference")
    reference_clips, wanted = _measure(reference, cases, device)
    return QualityReport(
        engine=engine,
        reference=wanted,
        psnr_db=float(np.mean([psnr_db(*pair) for pair in zip(clips, reference_clips, strict=True)])),
        failures=losses(engine.scores, wanted.scores),
        reference_misses=misses(wanted.scores, variant),
    )


def losses(scores: Scores, reference: Scores) -> list[str]:
    """Return by which scores an engine is worse than the reference, beyond what is tolerated."""
    found = []
    for (name, share), (_, wanted) in zip(scores.items(), reference.items(), strict=True):
        if wanted.right - share.right > TOLERATED_PROMPTS:
            found.append(f"{name} is right {share.right} times, the reference's {wanted.right} times of {wanted.of}")
    return found


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Return the PSNR between two clips of the same shape, in dB; `HIGHEST_PSNR_DB` if they are the same."""
    error = float(np.mean((frames.astype(np.float32) - reference) ** 2))
    return min(HIGHEST_PSNR_DB, 10 * math.log10(255**2 / error)) if error else HIGHEST_PSNR_DB


def _measure(folder: Path, cases: Sequence[Case], device: str) -> tuple[list[Frames], EngineQuality]:
    engines = load_engines(folder, device=device, text_encoder="keep")
    config = engines.manifest.config
    with VideoSession(engines) as session:
        clips = list(make_clips(session, config, cases))
    frames = [clip.frames for clip in clips]
    name = f"{config.backend} {config.precision}"
    return frames, EngineQuality(name=name, scores=score(cases, frames), steady_fps=steady_fps(clips))
