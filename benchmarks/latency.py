"""Time an engine from process start to the last frame of a clip, beside peers in the same process and run.

Reported apart: process start to first frames, in processes of their own; whole clips and their AR steps; stages of a
step, from other clips, since marking them costs; text encoding. Clips are 81 frames long, frames on the host. Runs take
turns, and ratios are of neighbours.

    python -m benchmarks.latency --engine FOLDER --peers eager,upstream --upstream ~/Causal-Forcing
    python -m benchmarks.latency --slug shapes --backend onnxruntime --device cpu --peers eager
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import ROOT, head_commit
from benchmarks.clips import TimedSession, dit_ms, frames_of, summarise
from benchmarks.cold_start import measure_cold_start
from benchmarks.conditions import describe_engine, describe_machine, device_slug
from benchmarks.module_engines import cut_modules, module_engines
from benchmarks.peers import PEERS, ClipMaker, Runner, run_interleaved
from benchmarks.records import add_record_arguments, write_record
from benchmarks.statistics import ratios, significant, spread
from benchmarks.subject import add_engine_arguments, engine_folder, peer_job
from benchmarks.upstream import UpstreamPeer
from benchmarks.upstream_modules import check_clone
from causal_forcing.build_engines.builder import BuildJob, build
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.loading import engine_device, load_engines
from causal_forcing.runtime.manifest import Manifest, read_manifest

CLIP_LATENT_FRAMES = 21
"""Latent frames of a clip where nothing else is said: 81 frames, as long as upstream trained."""


def main() -> None:
    """Measure, print one JSON record."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as root:
        folder, build_s = engine_folder(arguments, Path(root))
        manifest = read_manifest(folder)
        device = engine_device(manifest, arguments.device)
        geometry = manifest.config.geometry
        chunks = arguments.total_blocks or CLIP_LATENT_FRAMES // geometry.chunk_frames
        cold_starts = [measure_cold_start(folder, str(device), ROOT) for _ in range(arguments.cold_starts)]
        runners = make_runners(arguments, folder, manifest, device, chunks)
        counts = {"repeats": arguments.repeats, "staged_repeats": arguments.staged_repeats}
        run_interleaved(runners, warm_ups=arguments.warm_ups, **counts)
    record = {
        "benchmark": "latency",
        "conditions": {
            "commit": arguments.commit,
            **describe_engine(manifest.config),
            **describe_machine(device),
            "prompt": "a random embedding; text encoding is reported apart",
            "chunks": chunks,
            "frames": frames_of(manifest.config, chunks),
            "warm_up_clips": arguments.warm_ups,
            **counts,
            **({"upstream_commit": arguments.upstream_commit} if arguments.upstream else {}),
        },
        "build_s": None if build_s is None else round(build_s, 1),
        "engine_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "cold_start": summarise_cold_starts(cold_starts),
        "runs": [describe_run(runner) for runner in runners],
        "ratios": compare(runners, same_weights=manifest.config.weights.startswith("random:")),
    }
    write_record(record, arguments.output, device=device_slug(device))
    failed = [runner.name for runner in runners if runner.error]
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; see above")


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--peers", default="", help=f"comma-separated, of {', '.join(PEERS)}, backend:NAME")
    parser.add_argument("--upstream", type=Path, help="clone of thu-ml/Causal-Forcing, for the peer of that name")
    parser.add_argument("--upstream-commit", help="commit to record of it; by default the clone's")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--total-blocks", type=int, help="chunks of a clip; 81 frames where left out")
    parser.add_argument("--warm-ups", type=int, default=2, help="clips before those that count; graphs take two")
    parser.add_argument("--repeats", type=int, default=3, help="clips that count")
    parser.add_argument("--staged-repeats", type=int, default=2, help="clips more, with their stages timed")
    parser.add_argument("--cold-starts", type=int, default=2, help="processes that make a first chunk")
    add_record_arguments(parser)
    arguments = parser.parse_args()
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    for name in arguments.peers:
        if name not in (*PEERS, *(f"backend:{backend}" for backend in BACKENDS)):
            parser.error(f"--peers {name} is none of {', '.join(PEERS)}, and no backend:NAME")
    if ("upstream" in arguments.peers) != (arguments.upstream is not None):
        parser.error("the peer upstream and --upstream PATH, a clone of it, belong together")
    if arguments.upstream is not None:
        check_clone(arguments.upstream)
        arguments.upstream_commit = arguments.upstream_commit or head_commit(arguments.upstream)
    return arguments


def make_runners(
    arguments: argparse.Namespace, folder: Path, manifest: Manifest, device: torch.device, chunks: int
) -> list[Runner]:
    """Return the engine and its peers, none of them open."""
    config = manifest.config

    def open_engine() -> ClipMaker:
        return TimedSession(load_engines(folder, device=str(device)), chunks)

    about = f"{config.backend} engine of {config.variant.slug}"
    runners = [Runner(name="engine", about=about, precision=config.precision, open=open_engine, device=device)]
    if not arguments.peers:
        return runners
    job = peer_job(folder, str(device))
    modules = functools.cache(lambda: cut_modules(job, device))  # drawn once, shared by the peers that use them
    compiler = arguments.compiler
    openers: dict[str, tuple[Callable[[], ClipMaker], str]] = {
        "upstream": (lambda: open_upstream(arguments.upstream, job, device, chunks), "thu-ml, eager"),
        "eager": (lambda: open_modules(job, modules(), device, chunks), "this project's torch modules, eager"),
        "compile": (
            lambda: open_modules(job, modules(), device, chunks, compiler=compiler),
            f"the same modules and weights, torch.compile ({compiler}), the DiT layer by layer",
        ),
        "compile-graph": (
            lambda: open_modules(job, modules(), device, chunks, compiler=compiler, in_graph=True),
            f"the same modules and weights, torch.compile ({compiler}), every network in a CUDA graph",
        ),
    }
    for name in arguments.peers:
        if name in openers:
            opener, about = openers[name]
        else:
            backend = name.removeprefix("backend:")
            opener, about = functools.partial(open_backend, folder, backend, device, chunks), f"{backend} engine"
        runners.append(Runner(name=name, about=about, precision=job.config.precision, open=opener, device=device))
    return runners


def open_backend(folder: Path, backend: str, device: torch.device, chunks: int) -> ClipMaker:
    """Open an engine of another backend, built anew and kept nowhere."""
    with tempfile.TemporaryDirectory() as root:
        built = Path(root) / "engine"
        build(peer_job(folder, str(device), backend), built)
        return TimedSession(load_engines(built, device=str(device)), chunks)


def open_modules(
    job: BuildJob,
    networks: list[Network],
    device: torch.device,
    chunks: int,
    *,
    compiler: str | None = None,
    in_graph: bool = False,
) -> ClipMaker:
    """Open a peer of this project's torch modules."""
    return TimedSession(module_engines(job, networks, device, compiler=compiler, in_graph=in_graph), chunks)


def open_upstream(root: Path, job: BuildJob, device: torch.device, chunks: int) -> ClipMaker:
    """Open upstream."""
    dtype = getattr(torch, job.config.dtype)
    assert isinstance(dtype, torch.dtype), f"{job.config.dtype} names a torch dtype"
    return UpstreamPeer(root, job.config, dtype, device, chunks)


def describe_run(runner: Runner) -> dict[str, Any]:
    """Return what is reported of one of those that ran."""
    described: dict[str, Any] = {"name": runner.name, "about": runner.about, "precision": runner.precision}
    if runner.error is not None:
        return {**described, "error": runner.error}
    return {**described, **runner.facts, **summarise(runner.plain, runner.staged)}


def summarise_cold_starts(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the spread of process starts, and each."""
    if not runs:
        return None
    return {"first_frames_s": spread([run["first_frames_s"] for run in runs]), "runs": runs}


def compare(runners: list[Runner], *, same_weights: bool) -> dict[str, Any]:
    """Return how many times faster the engine is than each peer: clip by clip, in the order they ran.

    Where weights are the same, also how far its first chunk is from the peer's: a fast engine has to be right too.
    """
    engine, *peers = runners
    compared: dict[str, Any] = {}
    for peer in peers:
        if engine.error is not None or peer.error is not None:
            continue
        compared[peer.name] = {
            "fps": ratios([clip.total_ms for clip in peer.plain], [clip.total_ms for clip in engine.plain])
        }
        if engine.staged:
            passes_ms = [[dit_ms(clip) for clip in runner.staged] for runner in (peer, engine)]
            compared[peer.name]["dit"] = ratios(*passes_ms)
        if same_weights and engine.latents is not None and peer.latents is not None:
            difference = (engine.latents - peer.latents).norm() / peer.latents.norm()
            compared[peer.name]["first_latents_relative_error"] = significant(difference.item())
    return compared


if __name__ == "__main__":
    main()
