"""Time every network of an engine by itself, and hold it to the floor that its counted work has on the device.

Passes of the DiT are timed with the cache filled to the first chunk, to the half, and to its end. Of an engine for
several ranks, one is timed alone: copies stand in for what the others would send.

    python -m benchmarks.stages --engine FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.clips import SEED
from benchmarks.conditions import describe_engine, describe_machine, device_slug
from benchmarks.records import add_record_arguments, write_record
from benchmarks.statistics import percentiles, significant
from benchmarks.subject import add_engine_arguments, engine_folder, peer_job
from benchmarks.timing import time_calls
from benchmarks.work import Work, count_work, find_rates
from causal_forcing.plugins.ranks import rehearse
from causal_forcing.runtime.engine import Engine, IOTensors
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.manifest import read_manifest


def main() -> None:
    """Measure, print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--warm-ups", type=int, default=3, help="calls before those that count")
    parser.add_argument("--repeats", type=int, default=10, help="calls that count")
    add_record_arguments(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder, _ = engine_folder(arguments, Path(root))
        ranks = read_manifest(folder).config.context_parallel
        with rehearse(ranks):
            record, device = measure(arguments, folder)
    slug = device_slug(device)
    write_record(record, arguments.output, device=slug if ranks == 1 else f"one-of-{ranks}x-{slug}")


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], torch.device]:
    """Time the networks of an engine; returns the record, and the device that they ran on."""
    engines = load_engines(folder, device=arguments.device)
    device, config = engines.device, engines.manifest.config
    io_tensors = bind_random_tensors(engines)
    work = {
        fill: count_work(peer_job(folder, str(device)), config, fill * config.geometry.tokens_per_frame)
        for fill in fills(config.geometry)
    }
    networks = [
        entry
        for name, engine in all_engines(engines, io_tensors)
        for entry in time_network(name, engine, io_tensors, arguments, engines, work)
    ]
    rates = find_rates(describe_machine(device)["device"], config.precision)
    record = {
        "benchmark": "stages",
        "conditions": {
            "commit": arguments.commit,
            **describe_engine(config),
            **({"ranks": config.context_parallel} if config.context_parallel > 1 else {}),
            **describe_machine(device),
            "inputs": "random",
            "warm_ups": arguments.warm_ups,
            "repeats": arguments.repeats,
            "floor": None if rates is None else rates.source,
        },
        "networks": networks,
    }
    return record, device


def fills(geometry: Geometry) -> list[int]:
    """Return the latent frames that the cache is filled to: one chunk, half the window, all of it."""
    half = max(1, geometry.window_frames // 2 // geometry.chunk_frames) * geometry.chunk_frames
    return sorted({geometry.chunk_frames, half, geometry.window_frames})


def all_engines(engines: EngineSet, io_tensors: IOTensors) -> Iterator[tuple[str, Engine]]:
    """Yield every engine by name; those of a text encoder are loaded one after the other."""
    yield from engines.engines.items()
    if engines.text_encoder is not None:
        for network in engines.text_encoder.networks:
            engine = engines.text_encoder.load(network.name)
            engine.bind(io_tensors)
            yield network.name, engine


def bind_random_tensors(engines: EngineSet) -> IOTensors:
    """Give engines their buffers, full of random numbers; slots and masks that are valid."""
    io_tensors = engines.bind()
    geometry = engines.manifest.config.geometry
    generator = torch.Generator(engines.device).manual_seed(SEED)
    for name, tensor in io_tensors.items():
        if tensor.is_floating_point():
            wide = tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
            tensor.copy_(wide.normal_(generator=generator))
        elif "valid" in name:
            tensor.fill_(geometry.cache_slots)
        elif "slots" in name:
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) * geometry.tokens_per_frame)
        else:
            tensor.fill_(1)  # token ids, and a mask that hides nothing
    return io_tensors


def time_network(
    name: str,
    engine: Engine,
    io_tensors: IOTensors,
    arguments: argparse.Namespace,
    engines: EngineSet,
    work: dict[int, dict[str, Work]],
) -> list[dict[str, Any]]:
    """Time one network, at every fill of the cache where it reads that; returns an entry for each."""
    config = engines.manifest.config
    valid_slots = [io_tensors[io.name] for io in engine.spec.inputs if io.name.endswith("valid_slots")]
    entries = []
    for fill in fills(config.geometry) if valid_slots else [config.geometry.window_frames]:
        if valid_slots:
            valid_slots[0].fill_(fill * config.geometry.tokens_per_frame)
        times_ms = time_calls(
            engine.enqueue, engines.device, warm_ups=arguments.warm_ups, repeats=arguments.repeats, cold=True
        )
        entry: dict[str, Any] = {"network": name, "ms": percentiles(times_ms)}
        if valid_slots:
            entry["window_frames_filled"] = fill
        entries.append(entry | hold_to_floor(work[fill].get(name), statistics.median(times_ms), engines))
    return entries


def hold_to_floor(work: Work | None, median_ms: float, engines: EngineSet) -> dict[str, Any]:
    """Return a network's counted work, the rate that its time means, and its floor where the device's rates are known.

    A network that is not cut from the modules here, such as one that was merged, has no count.
    """
    if work is None:
        return {}
    entry: dict[str, Any] = {
        "gflop": {
            "linear": significant(work.linear / 1e9),
            "attention": significant(work.attention / 1e9),
            "convolution": significant(work.convolution / 1e9),
        },
        "tflops": significant(work.total / median_ms / 1e9),
    }
    rates = find_rates(describe_machine(engines.device)["device"], engines.manifest.config.precision)
    if rates is not None:
        entry["floor_ms"] = round(work.floor_ms(rates), 3)
        entry["of_floor"] = round(work.floor_ms(rates) / median_ms, 3)
    return entry


if __name__ == "__main__":
    main()
