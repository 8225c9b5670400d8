"""Engines of the `cuda` backend on a GPU: as exact as bf16 allows, without waits, and nothing compiled when loaded."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.engines.kernel_cache import KERNELS_FOLDER
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.manifest import Manifest, read_manifest
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.session import VideoSession

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = torch.device("cuda")
PROCESS = Path(__file__).with_name("cuda_engine_process.py")
ENGINES = ("tiny-3", "wide-3", "wide-1")
SEEDS = (0, 1, 2)
BLOCKS = 5
"""Chunks of a clip: of three frames, two are made by joint passes and two behind a window that is full."""
LEEWAY = 1.5
"""How much more error than the modules' own, in bf16 too, an engine may have against fp32. It rounds at fewer places,
once for each fused op, so it has less to be expected; the rest is for two samples of the same rounding noise."""

Built = dict[str, Path]


@pytest.fixture(scope="module")
def built(engine_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Engine directories by name, each built by a process of its own, as `cf-build` is; all at a time."""
    root = tmp_path_factory.mktemp("engines")
    running = {
        name: subprocess.Popen(
            [sys.executable, str(PROCESS), "build", *name.split("-"), str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_CACHE_DIR": str(root / "elsewhere")},
        )
        for name in ENGINES
    }
    folders = {}
    for name, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        folders[name] = Path(out.splitlines()[-1])
    return folders


# --- the modules themselves -----------------------------------------------------------------------------------------


class ModuleEngine:
    """An engine that is a torch module, whose states may come out as new tensors."""

    def __init__(self, network: Network) -> None:
        self.spec = network.spec
        self._module = network.module

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        states = dict(self.spec.states)
        self._inputs = [io_tensors[io.name] for io in self.spec.inputs]
        self._targets = [io_tensors[states.get(io.name, io.name)] for io in self.spec.outputs]

    @torch.inference_mode()
    def enqueue(self) -> None:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self._module(*self._inputs)
        for target, output in zip(self._targets, (outputs,) if torch.is_tensor(outputs) else outputs, strict=True):
            if output is not target:
                target.copy_(output)


def modules_of(folder: Path, precision: str) -> EngineSet:
    """Return engines that are the modules of an engine directory: the same weights, in any precision."""
    manifest = read_manifest(folder)
    config = dataclasses.replace(manifest.config, backend="torch", precision=precision)
    source = RandomModels(model=config.variant.model, seed=0, dtype=torch.bfloat16)
    names = {network.name for network in manifest.networks}
    parts = ("dit", "vae") if "vae_decoder" in names else ("dit",)
    networks = list(cut_networks(BuildJob(config=config, source=source, parts=parts)))
    for network in networks:
        network.module.to(DEVICE, getattr(torch, config.dtype))
    return EngineSet(
        folder=folder,
        manifest=Manifest(config=config, networks=tuple(n.spec for n in networks), artefacts={}, files={}),
        engines={network.spec.name: ModuleEngine(network) for network in networks},
        device=DEVICE,
    )


def embedding(config: EngineConfig, seed: int = 3) -> torch.Tensor:
    dit = config.variant.model.dit
    return torch.randn((1, dit.text_len, dit.text_dim), generator=torch.Generator().manual_seed(seed))


def clips(engines: EngineSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and pixels of one clip a seed, on the CPU in fp64."""
    latents, pixels = [], []
    with VideoSession(engines) as session:
        for seed in SEEDS:
            for chunk in session.generate(embedding(engines.manifest.config), total_blocks=BLOCKS, seed=seed):
                latents.append(chunk.latents.cpu().double())
                pixels.append(chunk.pixels.cpu().double().flatten())
    return torch.cat(latents), torch.cat(pixels)


def without(engines: EngineSet, name: str) -> EngineSet:
    kept = {each: engine for each, engine in engines.engines.items() if each != name}
    return dataclasses.replace(engines, engines=kept)


class Counted:
    """An engine that notes its name at each call."""

    def __init__(self, engine: Engine, calls: list[str]) -> None:
        self.spec: NetworkSpec = engine.spec
        self._engine, self._calls = engine, calls

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        self._engine.bind(io_tensors)

    def enqueue(self) -> None:
        self._calls.append(self.spec.name)
        self._engine.enqueue()


def counted(engines: EngineSet) -> tuple[EngineSet, list[str]]:
    calls: list[str] = []
    wrapped = {name: Counted(engine, calls) for name, engine in engines.engines.items()}
    return dataclasses.replace(engines, engines=wrapped), calls


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(built: Built) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Latents and pixels of an engine's clips in fp32, and once only."""
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in known:
            known[name] = clips(modules_of(built[name], "fp32"))
        return known[name]

    return of


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert got.isfinite().all()
    return float((got - want).norm() / want.norm()) if want.numel() else 0.0


Exact = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("name", ENGINES)
def test_clips_of_an_engine_are_as_exact_as_the_modules_are_in_bf16(name: str, built: Built, exact: Exact) -> None:
    engines, calls = counted(load_engines(built[name], device="cuda"))
    for got, eager, want in zip(clips(engines), clips(modules_of(built[name], "bf16")), exact(name), strict=True):
        limit = LEEWAY * relative_error(eager, want)
        error = relative_error(got, want)
        assert error <= limit, f"relative error {error:.2e}, of the modules {limit / LEEWAY:.2e}"
        assert not want.numel() or 0 < limit < 0.3, "bf16 is seen, and is not all that is seen"
    chunk_frames = engines.manifest.config.geometry.chunk_frames
    assert calls.count("dit_context_step") == len(SEEDS) * min(BLOCKS - 1, 9 // chunk_frames - 1)


@pytest.mark.parametrize("name", ENGINES)
def test_joint_passes_are_as_exact_as_separate_ones(name: str, built: Built, exact: Exact) -> None:
    want, _ = exact(name)
    joint, _ = clips(load_engines(built[name], device="cuda"))
    separate, _ = clips(without(load_engines(built[name], device="cuda"), "dit_context_step"))
    errors = [relative_error(latents, want) for latents in (joint, separate)]
    assert max(errors) <= LEEWAY * min(errors)


def test_text_encoder_is_as_exact_as_its_module_is_in_bf16(built: Built) -> None:
    engines = load_engines(built["tiny-3"], device="cuda")
    assert engines.text_encoder is not None
    config = engines.manifest.config
    io_tensors = engines.bind()
    io_tensors["token_ids"][:, :9] = torch.arange(40, 49, device=DEVICE)
    io_tensors["token_mask"][:, :9] = 1
    inputs = io_tensors["token_ids"], io_tensors["token_mask"]
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        source = RandomModels(model=config.variant.model, seed=0, dtype=torch.bfloat16)
        job = BuildJob(config=config, source=source, parts=("text_encoder",))
        (network,) = cut_networks(job)
        with torch.inference_mode():
            outputs.append(network.module.to(DEVICE, dtype)(*inputs).double())
    engines.text_encoder.enqueue()
    want, eager = outputs
    error = relative_error(io_tensors["prompt_embeds"].double(), want)
    assert 0 < error <= LEEWAY * relative_error(eager, want)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("name", ["wide-3", "wide-1"])
def test_heads_of_128_are_attended_by_the_kernel_for_hopper(
    name: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    from causal_forcing.plugins.kernels import projected_launch

    attended: list[tuple[int, ...]] = []
    attend = vars(projected_launch)["attend"]

    def noted(q: torch.Tensor, *arguments: torch.Tensor, scale: float) -> None:
        attended.append(tuple(q.shape))
        attend(q, *arguments, scale=scale)

    monkeypatch.setattr(projected_launch, "attend", noted)
    engines = load_engines(built[name], device="cuda")
    engines.bind()
    geometry, layers = engines.manifest.config.geometry, engines.manifest.config.variant.model.dit.num_layers
    one, two = ((1, 2, chunks * geometry.chunk_tokens, 128) for chunks in (1, 2))
    # Every network is played once before it is captured and once while: two passes of one chunk, one of two.
    assert attended.count(one) == 2 * 2 * layers
    assert attended.count(two) == 2 * layers


# --- how it is run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(built: Built) -> Iterator[VideoSession]:
    with VideoSession(load_engines(built["wide-3"], device="cuda")) as made:
        list(made.generate(embedding(read_manifest(built["wide-3"]).config), total_blocks=BLOCKS))
        torch.cuda.synchronize()
        yield made


def test_host_waits_for_nothing_between_hand_outs(session: VideoSession, built: Built) -> None:
    """All that a clip does but for handing pixels to the host: passes, noise, placement, decoding."""
    chunks = session.generate(embedding(read_manifest(built["wide-3"]).config), total_blocks=BLOCKS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [chunk.latents for chunk in chunks]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(made) == BLOCKS


WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


def test_profiler_sees_graphs_launched_and_no_call_that_waits(session: VideoSession, built: Built) -> None:
    chunks = session.generate(embedding(read_manifest(built["wide-3"]).config), total_blocks=BLOCKS)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with record_function("passes"):
            assert sum(1 for _ in chunks) == BLOCKS
        torch.cuda.synchronize()
    on_host = [event for event in profiled.events() if event.device_type.name == "CPU"]
    (span,) = [event.time_range for event in on_host if event.name == "passes"]
    called = [event.name for event in on_host if span.start <= event.time_range.start <= span.end]
    if not any(name.startswith("cuda") for name in called):
        pytest.skip("the profiler may not see the CUDA runtime here")
    assert not WAITS & set(called)
    # Four steps a chunk less those that joint passes begin, context passes, and a decode of each chunk.
    joint = 2
    assert called.count("cudaGraphLaunch") == 4 * BLOCKS - joint + (BLOCKS - 1) + BLOCKS


def test_graphs_serve_another_prompt_and_give_a_clip_again_to_the_last_bit(session: VideoSession, built: Built) -> None:
    config = read_manifest(built["wide-3"]).config

    def clip(prompt: int, seed: int, blocks: int = BLOCKS) -> list[tuple[torch.Tensor, torch.Tensor]]:
        chunks = session.generate(embedding(config, prompt), total_blocks=blocks, seed=seed)
        return [(chunk.latents, chunk.pixels) for chunk in chunks]

    first, other_prompt, other_seed = clip(3, 0), clip(4, 0), clip(3, 1)
    abandoned = session.generate(embedding(config, 5), seed=9)
    next(abandoned), next(abandoned)
    again, shorter = clip(3, 0), clip(3, 0, blocks=2)
    torch.cuda.synchronize()
    for kept, same in ((first, again), (first[:2], shorter)):
        for one, two in zip(kept, same, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
    for other in (other_prompt, other_seed):
        assert all((one[0] - two[0]).abs().max() > 1e-2 for one, two in zip(first, other, strict=True))


def test_session_that_is_made_anew_binds_the_same_engines_again(built: Built) -> None:
    """Another session's buffers are captured anew, and nothing of the old ones is read."""
    engines = load_engines(built["tiny-3"], device="cuda")
    once, _ = clips(engines)
    again, _ = clips(engines)
    assert torch.equal(once, again)


def test_graphs_of_one_kind_share_their_memory_and_those_that_may_overlap_do_not(built: Built) -> None:
    """Passes follow each other, and so do decodes; but a chunk is decoded while the next pass runs."""
    engines = load_engines(built["wide-3"], device="cuda")
    engines.bind()
    graphs = {name: getattr(engine, "_graph", None) for name, engine in engines.engines.items()}
    pools = {name: graph.pool() for name, graph in graphs.items() if graph is not None}
    captured = ["dit_context", "dit_context_step", "dit_step", "prompt_kv", "vae_decoder", "vae_decoder_first"]
    assert sorted(pools) == captured
    passes, decodes = ({pool for name, pool in pools.items() if name.startswith(kind)} for kind in ("dit", "vae"))
    assert len(passes) == len(decodes) == 1
    assert not passes & decodes


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of all files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("name", ["wide-3"])
def test_loading_compiles_nothing_where_the_engine_was_built_nor_where_it_was_moved(
    name: str, built: Built, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(built[name], tmp_path / "another folder" / "engine"))
    folders = {"built": built[name], "moved": moved}
    before = {where: listing(folder / KERNELS_FOLDER) for where, folder in folders.items()}
    assert any(file.endswith(".cubin") for file in before["built"])
    running = {
        where: subprocess.Popen(
            [sys.executable, str(PROCESS), "load", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / f"elsewhere-{where}")},
        )
        for where, folder in folders.items()
    }
    hashes = set()
    for where, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        hashes.add(out)
        assert listing(folders[where] / KERNELS_FOLDER) == before[where], where
        assert not listing(tmp_path / f"elsewhere-{where}"), "kernels of elsewhere"
    assert len(hashes) == 1, "every process makes the same bits"
