"""Time whole clips through `VideoSession`: every AR step with its decode, and what the run was made of.

Builds an engine with random weights and without the text encoder (a random embedding stands in for the prompt), then
generates the same clip several times in one process. The first is a warm-up and reported apart.

    python benchmarks/session_clip.py --backend torch --device cuda --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from causal_forcing.build_engines.builder import build
from causal_forcing.build_engines.planner import make_job
from causal_forcing.runtime.config import EngineOptions
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.session import VideoSession

SEED = 0


def main() -> None:
    """Build, generate, print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", default="causal-forcing-wan2.1-t2v-1.3b-chunkwise")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--pixel-height", type=int)
    parser.add_argument("--pixel-width", type=int)
    parser.add_argument("--total-blocks", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=2, help="timed clips after the warm-up")
    parser.add_argument("--output", type=Path, help="folder for the JSON record")
    parser.add_argument("--commit", default=_head(), help="commit to record; by default the checkout's")
    arguments = parser.parse_args()
    options = EngineOptions(
        slug=arguments.slug,
        backend=arguments.backend,
        precision=arguments.precision,
        pixel_height=arguments.pixel_height,
        pixel_width=arguments.pixel_width,
        random_weights=SEED,
    )
    job = replace(make_job(options, device=arguments.device), parts=("dit", "vae"))
    with tempfile.TemporaryDirectory() as root:
        started_s = time.perf_counter()
        manifest = build(job, Path(root) / "engine")
        built_s = time.perf_counter()
        engines = load_engines(Path(root) / "engine", device=arguments.device)
        loaded_s = time.perf_counter()
        clips = time_clips(engines, arguments.total_blocks, 1 + arguments.repeats)
    record = {
        "benchmark": "session_clip",
        "conditions": {"commit": arguments.commit, **conditions(engines)},
        "build_s": round(built_s - started_s, 1),
        "engine_gib": round(sum(entry.bytes for entry in manifest.files.values()) / 2**30, 2),
        "load_s": round(loaded_s - built_s, 1),
        "warm_up": clips[0],
        "clips": clips[1:],
        "steady_step_s_p50": statistics.median(s for clip in clips[1:] for s in clip["step_s"][-3:]),
        "fps": [round(clip["frames"] / sum(clip["step_s"]), 2) for clip in clips[1:]],
        "peak_gib": peak_gib(engines.device),
    }
    print(json.dumps(record, indent=1))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = f"session_clip-{options.slug}-{job.config.backend}-{engines.device.type}.json"
        (arguments.output / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def time_clips(engines: EngineSet, total_blocks: int, clips: int) -> list[dict[str, Any]]:
    """Generate the same clip several times; a step is one chunk with its decode and the context pass before it."""
    results: list[dict[str, Any]] = []
    with VideoSession(engines) as session:
        dit = engines.manifest.config.variant.model.dit
        generator = torch.Generator().manual_seed(SEED)
        embedding = torch.randn(1, dit.text_len, dit.text_dim, generator=generator).to(engines.device)
        for _ in range(clips):
            frames, steps_s = 0, []
            started_s = time.perf_counter()
            for chunk in session.generate(embedding, total_blocks=total_blocks, seed=SEED):
                frames += len(chunk.frames())  # on the host: nothing of the chunk is still under way
                now_s = time.perf_counter()
                steps_s.append(round(now_s - started_s, 4))
                started_s = now_s
                if chunk.index + 1 == total_blocks:
                    break
            results.append({"frames": frames, "step_s": steps_s})
    return results


def conditions(engines: EngineSet) -> dict[str, Any]:
    """Describe what the numbers were taken with."""
    config = engines.manifest.config
    on_gpu = engines.device.type == "cuda"
    return {
        "slug": config.variant.slug,
        "weights": config.weights,
        "text_encoder": "left out; the prompt is a random embedding",
        "geometry": asdict(config.geometry),
        "precision": config.precision,
        "backend": config.backend,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _head() -> str | None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def peak_gib(device: torch.device) -> float:
    """Return the peak memory so far: torch's on a GPU, the process's elsewhere."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30, 2)


if __name__ == "__main__":
    main()
