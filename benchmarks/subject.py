"""The engine that is measured: which options name it, how it is built or found, and the job its peers are cut from."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.clips import SEED
from causal_forcing.build_engines.builder import ALL_PARTS, BuildJob, build
from causal_forcing.build_engines.planner import make_job
from causal_forcing.runtime.backends import choose_device
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.manifest import read_manifest


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an engine."""
    parser.add_argument("--engine", type=Path, help="engine directory; its own slug, precision and sizes count then")
    parser.add_argument("--slug", default="causal-forcing-wan2.1-t2v-1.3b-chunkwise")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--pixel-height", type=int)
    parser.add_argument("--pixel-width", type=int)
    parser.add_argument("--window-frames", type=int)
    parser.add_argument("--decoder")
    parser.add_argument("--text-encoder", action="store_true", help="build the text encoder too, and time it")


def engine_folder(arguments: argparse.Namespace, root: Path) -> tuple[Path, float | None]:
    """Return the engine directory to measure and the seconds that building it took; None where it was given.

    Weights of an engine that is built are random, but those that come with the package.
    """
    if arguments.engine is not None:
        return arguments.engine.resolve(), None
    started_s = time.monotonic()
    parts = ALL_PARTS if arguments.text_encoder else ("dit", "vae")
    options = EngineOptions(
        slug=arguments.slug,
        backend=arguments.backend,
        precision=arguments.precision,
        pixel_height=arguments.pixel_height,
        pixel_width=arguments.pixel_width,
        window_frames=arguments.window_frames,
        decoder=arguments.decoder,
        random_weights=SEED,
    )
    job = replace(make_job(options, device=arguments.device), parts=parts)
    build(job, root / "engine", progress=lambda name: print(f"building {name}", file=sys.stderr))
    return root / "engine", time.monotonic() - started_s


def peer_job(folder: Path, device: str, backend: str = "torch") -> BuildJob:
    """Return the job of another backend, or of torch modules, for an engine's sizes and ranks; without fp8.

    Weights are those of the engine where it has random ones; else they are random too, which costs no less time.
    """
    config = read_manifest(folder).config
    seed = int(config.weights.removeprefix("random:")) if config.weights.startswith("random:") else SEED
    return replace(make_job(_peer_options(config, seed, device, backend), device=device), parts=("dit", "vae"))


def _peer_options(config: EngineConfig, seed: int, device: str, backend: str) -> EngineOptions:
    on_gpu = choose_device(device).startswith("cuda")
    precision = config.precision if config.precision in ("bf16", "fp16", "fp32") else "bf16" if on_gpu else "fp32"
    geometry = config.geometry
    return EngineOptions(
        slug=config.variant.slug,
        backend=backend,
        precision=precision,
        pixel_height=geometry.pixel_height,
        pixel_width=geometry.pixel_width,
        window_frames=geometry.window_frames,
        sink_frames=geometry.sink_frames,
        decoder=config.decoder,
        random_weights=seed,
        context_parallel=config.context_parallel,
    )
