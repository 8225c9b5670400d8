"""Process start to first frame: a process of its own that imports, loads an engine directory and makes one chunk.

python -m benchmarks.cold_start ENGINE_DIRECTORY --device cuda
"""

from __future__ import annotations

import time

STARTED_S = time.monotonic()  # before anything else is imported

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

PHASES = ("start_python", "import", "load_engines", "bind", "first_chunk")
"""What the time goes into, in order."""


def main() -> None:
    """Make the first chunk, print when each phase ended, on the clock that all processes of a machine share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    ends_s = [STARTED_S]
    import torch

    from benchmarks.clips import random_initial_latent, random_prompt
    from causal_forcing.runtime.loading import load_engines
    from causal_forcing.runtime.session import VideoSession

    ends_s.append(time.monotonic())
    engines = load_engines(arguments.engine, device=arguments.device)
    ends_s.append(time.monotonic())
    config = engines.manifest.config
    with VideoSession(engines) as session:
        prompt, initial = random_prompt(config, engines.device), random_initial_latent(config)
        if engines.device.type == "cuda":
            torch.cuda.synchronize()
        ends_s.append(time.monotonic())
        frames = len(next(session.generate(prompt, seed=0, initial_latents=initial)).frames())
        ends_s.append(time.monotonic())
        result: dict[str, Any] = {
            "ends_s": ends_s,
            "frames": frames,
            "host_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        if engines.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(engines.device)
            result["torch_peak_bytes"] = torch.cuda.max_memory_allocated(engines.device)
            # All that lies on the GPU, what torch did not allocate and other processes' memory included.
            result["device_used_bytes"] = total - free
    print(json.dumps(result))


def measure_cold_start(engine: Path, device: str, root: Path) -> dict[str, Any]:
    """Start such a process from the checkout at `root`, and return the seconds of each phase, and memory."""
    begun_s = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.cold_start", str(engine), "--device", device]
    finished = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"the process that loads {engine} failed with code {finished.returncode}: see above")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    ends_s = result.pop("ends_s")
    phases = [end - start for start, end in zip((begun_s, *ends_s), ends_s, strict=False)]
    return {
        "phases_s": {name: round(seconds, 3) for name, seconds in zip(PHASES, phases, strict=True)},
        "first_frames_s": round(ends_s[-1] - begun_s, 3),
        **result,
    }


if __name__ == "__main__":
    main()
