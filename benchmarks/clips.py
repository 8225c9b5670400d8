"""Clips, timed: what a session makes, step by step, and what a peer makes that hands out nothing before the end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.statistics import percentiles, spread
from benchmarks.timing import DIT_STAGES, CallLog, Mark, TimedEngine, marker, stage_of, synchronize, time_calls
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.session import VideoSession
from causal_forcing.runtime.text_encoder import TextEncoder

SEED = 0
"""Seed of random weights, noise and prompt embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What one clip took."""

    frames: int
    """Frames of video, all on the host at the end."""
    total_ms: float
    """From the call to the last frame on the host; prompt keys and values included, text encoding not."""
    step_ms: tuple[float, ...] = ()
    """AR steps: one chunk decoded and on the host, with a context pass, its own or that of the one before. Empty where
    nothing is handed out before the end."""
    stage_ms: tuple[dict[str, float], ...] = ()
    """Time of each stage in each step; none where stages were not timed."""


def frames_of(config: EngineConfig, chunks: int) -> int:
    """Return how many frames of video so many chunks make."""
    return 1 + 4 * (chunks * config.geometry.chunk_frames - 1)


def sum_stages(calls: Iterable[tuple[str, Mark, Mark]]) -> dict[str, float]:
    """Return the milliseconds of each stage; the device must have passed all marks."""
    stages: dict[str, float] = {}
    for name, begin, end in calls:
        stages[stage_of(name)] = stages.get(stage_of(name), 0.0) + begin.elapsed_ms(end)
    return stages


class TimedSession:
    """A session that makes the same clip over and over, with its stages timed or without.

    Args:
        engines: What it runs.
        chunks: Chunks of the clip.
    """

    def __init__(self, engines: EngineSet, chunks: int) -> None:
        self.config, self.device, self.chunks = engines.manifest.config, engines.device, chunks
        self.log = CallLog(marker(engines.device))
        timed = {name: TimedEngine(engine, self.log) for name, engine in engines.engines.items()}
        self._session = VideoSession(replace(engines, engines=timed))
        self._text_encoder = engines.text_encoder
        self._prompt = random_prompt(self.config, engines.device)
        self._initial = random_initial_latent(self.config)

    def clip(self, *, staged: bool) -> Clip:
        """Make a clip."""
        self.log.is_open = staged
        synchronize(self.device)
        frames, steps, calls = 0, [], []
        begun_s = started_s = time.perf_counter()
        generated = self._session.generate(
            self._prompt, total_blocks=self.chunks, seed=SEED, initial_latents=self._initial
        )
        for _ in range(self.chunks):
            frames += len(next(generated).frames())
            now_s = time.perf_counter()
            steps.append(1000 * (now_s - started_s))
            calls.append(self.log.take())
            started_s = now_s
        total_ms = 1000 * (time.perf_counter() - begun_s)
        synchronize(self.device)
        self.log.is_open = False
        stages = tuple(sum_stages(step) for step in calls) if staged else ()
        return Clip(frames=frames, total_ms=total_ms, step_ms=tuple(steps), stage_ms=stages)

    def facts(self) -> dict[str, Any]:
        """Return what is reported apart from clips: the time of the text encoder, where there is one."""
        return {} if self._text_encoder is None else time_text_encoder(self._text_encoder)

    def first_latents(self) -> torch.Tensor | None:
        """Return the first chunk's latents, fp32 on the host, to compare engines by; None where it is given."""
        if self._initial is not None:
            return None
        generated = self._session.generate(self._prompt, total_blocks=1, seed=SEED)
        return next(generated).latents.float().cpu()

    def close(self) -> None:
        """Free everything."""
        self._session.close()


def time_text_encoder(text_encoder: TextEncoder) -> dict[str, Any]:
    """Return the time of a text encoder that stays loaded, and of loading it and encoding once."""
    device = text_encoder.device
    kept = TextEncoder(text_encoder.networks, text_encoder.load, device, keep=True)
    io_tensors = IOTensors(kept.networks, device)
    for tensor in io_tensors.values():
        tensor.fill_(1)  # tokens that exist, and a mask that hides none
    kept.bind(io_tensors)
    started_s = time.perf_counter()
    kept.enqueue()
    synchronize(device)
    loaded_s = time.perf_counter()
    times_ms = time_calls(kept.enqueue, device, warm_ups=1, repeats=3)
    return {
        "text_load_and_encode_s": round(loaded_s - started_s, 3),
        "text_encoding_ms": spread(times_ms),
    }


def random_prompt(config: EngineConfig, device: torch.device) -> torch.Tensor:
    """Return a prompt embedding [1, text_len, text_dim] fp32 of random numbers, the same on every device."""
    dit = config.variant.model.dit
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, dit.text_len, dit.text_dim, generator=generator).to(device)


def random_initial_latent(config: EngineConfig) -> torch.Tensor | None:
    """Return a random first chunk [1, F, C, h, w] where clips start from an image; None elsewhere."""
    if not config.variant.takes_image:
        return None
    geometry = config.geometry
    shape = (1, geometry.chunk_frames, config.variant.model.dit.latent_channels)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(*shape, geometry.latent_height, geometry.latent_width, generator=generator)


def summarise(plain: list[Clip], staged: list[Clip]) -> dict[str, Any]:
    """Return what is reported of clips: whole ones and steps from those without stages, stages from the others."""
    (frames,) = {clip.frames for clip in (*plain, *staged)}
    summary: dict[str, Any] = {
        "frames": frames,
        "clip_ms": [round(clip.total_ms, 3) for clip in plain],
        "fps": spread([1000 * clip.frames / clip.total_ms for clip in plain]),
        "first_frames_ms": spread([clip.step_ms[0] if clip.step_ms else clip.total_ms for clip in plain]),
    }
    if all(clip.step_ms for clip in plain):
        summary |= {
            "step_ms": percentiles([ms for clip in plain for ms in clip.step_ms[1:] or clip.step_ms]),
            "last_step_ms": spread([clip.step_ms[-1] for clip in plain]),
            "steps_ms": [[round(ms, 3) for ms in clip.step_ms] for clip in plain],
        }
        if len(plain[0].step_ms) > 1:
            first = frames_in_first(frames, len(plain[0].step_ms))
            summary["steady_fps"] = spread([1000 * (frames - first) / sum(clip.step_ms[1:]) for clip in plain])
    steps = [stages for clip in staged for stages in clip.stage_ms]
    names = sorted({name for stages in steps for name in stages})
    summary["stages_ms"] = {name: percentiles([stages[name] for stages in steps if name in stages]) for name in names}
    if staged:
        summary["dit_step_ms"] = percentiles([dit_step_ms(stages) for stages in steps])
        # The step before the last has all of its passes, and one context pass, however a session orders them.
        summary["late_dit_step_ms"] = spread([dit_step_ms(clip.stage_ms[-2:][0]) for clip in staged])
        summary["dit_clip_ms"] = spread([dit_ms(clip) for clip in staged])
    summary["staged_clip_ms"] = [round(clip.total_ms, 3) for clip in staged]
    return summary


def dit_step_ms(stages: dict[str, float]) -> float:
    """Return the time of the DiT's passes in a step."""
    return sum(stages.get(name, 0.0) for name in DIT_STAGES)


def dit_ms(clip: Clip) -> float:
    """Return the time of the DiT's passes in a clip whose stages were timed."""
    return sum(map(dit_step_ms, clip.stage_ms))


def frames_in_first(frames: int, chunks: int) -> int:
    """Return the frames of a clip's first chunk: three fewer than of every other."""
    return (frames + 3) // chunks - 3
