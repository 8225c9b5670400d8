"""A rank of a clip that several processes make: `run_ranks` starts them and returns what each of them made."""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.cuda.tape_set import TapeSet
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.quantization.head_scales import HeadScales
from causal_forcing.build_engines.quantization.passes import ModuleEngine
from causal_forcing.build_engines.quantization.recipe import Recipe
from causal_forcing.plugins.ranks import decoding_ranks, exchanging_by_stores
from causal_forcing.plugins.row_ops import gather_rows
from causal_forcing.plugins.token_ops import gather_tokens
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.manifest import Manifest
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.session import Chunk, VideoSession
from tests.parity import adapter
from tests.parity.test_golden import GOLDEN, MANIFEST
from tests.runtime.cuda_engine_process import WIDE
from tests.runtime.stores_on_cpu import exchange_by_stores_on_cpu
from tests.shared_gpu import share_gpu


@dataclass(frozen=True, kw_only=True)
class ClipCase:
    """A clip to make."""

    slug: str = ""
    blocks: int = 0
    geometry: Mapping[str, int] = field(default_factory=dict)
    backend: str = "torch"
    """torch runs modules as they are, cuda its tapes, whose ops run their plain bodies."""
    fp8_cache: bool = False
    image: bool = False
    golden: str | None = None
    """A clip of upstream's in place of the slug's, made by tapes."""
    precision: str = "fp32"
    wide: bool = False
    """Whether heads are as wide as the released model's, for the kernels made for them."""
    stores: bool = False
    """Whether ranks write what layers exchange into each other's memory; on CPUs a process's last clip."""
    crossed: bool = False
    """No clip: see `cross_collectives`."""

    def config(self, ranks: int) -> EngineConfig:
        """Return the configuration for this many ranks."""
        options = EngineOptions(slug=self.slug, backend="torch", precision=self.precision, random_weights=0)
        config = resolve_engine(options, weights="random:0", device="cpu")
        geometry: Geometry = replace(config.geometry, **self.geometry)
        variant = replace(config.variant, model=WIDE) if self.wide else config.variant
        return replace(config, variant=variant, geometry=geometry, context_parallel=ranks, backend=self.backend)


def make_clip(case: ClipCase, ranks: int, index: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Make a clip as one of so many ranks; every rank but the first gets a prompt and an image of its own to ignore."""
    if case.stores:
        with exchanging_by_stores():
            return make_clip(replace(case, stores=False), ranks, index, device)
    if case.crossed:
        return cross_collectives(ranks, index)
    if case.golden is not None:
        golden = MANIFEST["cases"][case.golden]
        chunks, _ = adapter.generate_clip(golden, MANIFEST["weights"], GOLDEN, "cuda-on-cpu", ranks=ranks)
        return join(chunks)
    config = case.config(ranks)
    dit = config.variant.model.dit
    seeded = torch.Generator().manual_seed(3 + index)
    prompt = torch.randn((1, dit.text_len, dit.text_dim), generator=seeded)
    height, width = config.geometry.pixel_height, config.geometry.pixel_width
    image = torch.rand((1, 3, 1, height, width), generator=seeded).mul(2).sub(1).numpy() if case.image else None
    with tempfile.TemporaryDirectory() as folder:
        engines = make_engines(case, config, torch.device(device), Path(folder))
        with VideoSession(engines) as session:
            chunks = list(session.generate(prompt, total_blocks=case.blocks, image=image))
    (cache,) = (io for io in engines.engines["dit_step"].spec.inputs if io.name == "k_cache_00")
    return {**join(chunks), "cache": cache.shape}


def cross_collectives(ranks: int, index: int) -> dict[str, torch.Tensor]:
    """Gather a decoder's rows and a pass's tokens, each rank's its number, the second before the first on odd ranks.

    Both are of one size: where they met in one process group, each would receive parts of the other.
    """
    decoding_ranks(ranks)  # makes the decoder's group, as a session does
    made: dict[str, torch.Tensor] = {}

    def decode() -> None:
        made["rows"] = gather_rows(torch.full((1, 1, 1, 1, 6), float(index)), list(range(ranks)))

    def run_pass() -> None:
        made["tokens"] = gather_tokens(torch.full((1, 1, 6), 10.0 + index), ranks, ranks)

    begun = [threading.Thread(target=run, daemon=True) for run in (decode, run_pass)]
    for thread in reversed(begun) if index % 2 else begun:
        thread.start()
        time.sleep(0.2)  # until it is inside, where it waits for the other ranks
    for thread in begun:
        thread.join(timeout=20)
    assert made.keys() == {"rows", "tokens"}, f"rank {index} got nothing but {sorted(made)}"
    return made


def join(chunks: list[Chunk]) -> dict[str, Any]:
    """Return the latents and pixels of a clip."""
    return {kind: torch.cat([getattr(chunk, kind).cpu() for chunk in chunks], dim=1) for kind in ("latents", "pixels")}


def make_engines(case: ClipCase, config: EngineConfig, device: torch.device, folder: Path) -> EngineSet:
    """Return the engines of a case, with random weights; tapes go into the folder."""
    source = RandomModels(model=config.variant.model, seed=0, dtype=getattr(torch, config.dtype))
    recipe = None
    if case.fp8_cache:
        spec = config.variant.model.dit
        heads = torch.arange(spec.num_heads)
        scales = HeadScales(
            scales=torch.exp2(-5.0 - heads % 2).expand(3, -1).clone(),
            k_offset=0.1 * heads[:, None].expand(-1, spec.head_dim),
        )
        recipe = Recipe(
            linears={}, attention={f"blocks.{layer}.cache_attention": scales for layer in range(spec.num_layers)}
        )
    networks = list(cut_networks(BuildJob(config=config, source=source, parts=("dit", "vae")), recipe))
    engines: dict[str, Engine] = {}
    if case.backend == "cuda":
        tapes = TapeSet(folder)
        files = {network.spec.name: tapes.add(network) for network in networks}
        tapes.finish()
        weights = DeviceWeights(folder, device)
        engines = {n.spec.name: CudaEngine(weights, n.spec, folder / files[n.spec.name]) for n in networks}
    else:
        engines = {n.spec.name: ModuleEngine(n.spec, n.module) for n in networks}
    specs = tuple(network.spec for network in networks)
    manifest = Manifest(config=config, networks=specs, artefacts={}, files={})
    return EngineSet(folder=folder, manifest=manifest, engines=engines, device=device)


def spawn(function: Callable[..., None], ranks: int, *args: object) -> None:
    """Run `function(rank, *args)` in so many processes, which import its file by its name as part of `tests`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])
        mp.spawn(function, args=args, nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]


def run_ranks(cases: list[ClipCase], ranks: int, folder: Path, *, on_gpus: bool = False) -> list[list[dict[str, Any]]]:
    """Make clips by so many processes, on CPUs or on all GPUs in turn; returns what each rank made of each case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0" if on_gpus else "1")
        spawn(_run, ranks, cases, ranks, folder, on_gpus)
    return [torch.load(folder / f"{ranks}-{index}.pt", weights_only=False) for index in range(ranks)]


def _run(index: int, cases: list[ClipCase], ranks: int, folder: Path, on_gpus: bool) -> None:
    torch.set_num_threads(1)
    device = "cpu"
    if on_gpus:
        gpus = torch.cuda.device_count()
        device = f"cuda:{index % gpus}"
        torch.cuda.set_device(device)
        if gpus < ranks:
            share_gpu(index)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{folder / f'{ranks}.store'}",
        rank=index,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    clips = []
    for case in cases:
        if case.stores and not on_gpus:
            exchange_by_stores_on_cpu(folder)
        clips.append(make_clip(case, ranks, index, device))
    torch.save(clips, folder / f"{ranks}-{index}.pt")
    gc.collect()  # graphs that hold collectives, before NCCL is left
    dist.destroy_process_group()
