"""Passes over chunks: a context pass and the next chunk's first pass in one give what two passes give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.cuda.tape_set import TapeSet
from causal_forcing.build_engines.dit_networks import dit_networks
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.quantization.passes import ModuleEngine
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.denoiser import Denoiser
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.manifest import Manifest
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.noise import SeededNoise
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.schedule import plan_variant
from causal_forcing.runtime.session import Chunk, VideoSession

CPU = torch.device("cpu")
# fp32, in products of other shapes and thus sums of another order; carried on through all passes of a clip.
TOLERANCE = 1e-5
STEPS = 4


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


def make_config(slug: str, variant: Mapping[str, Any] | None = None, **geometry: Any) -> EngineConfig:
    options = EngineOptions(slug=slug, backend="torch", precision="fp32", pixel_height=16, pixel_width=32)
    config = resolve_engine(options, weights="random:0", device="cpu")
    return dataclasses.replace(
        config,
        variant=dataclasses.replace(config.variant, **{"takes_image": False, **(variant or {})}),
        geometry=dataclasses.replace(config.geometry, **geometry),
    )


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    return RandomModels(model=make_config("tiny").variant.model, seed=0, dtype=torch.float32).dit()


def engine_set(config: EngineConfig, networks: Sequence[Network], calls: list[str]) -> EngineSet:
    """Return engines that are the modules themselves."""
    specs = tuple(network.spec for network in networks)
    return EngineSet(
        folder=Path(),
        manifest=Manifest(config=config, networks=specs, artefacts={}, files={}),
        engines={n.spec.name: Counted(ModuleEngine(n.spec, n.module), calls) for n in networks},
        device=CPU,
    )


Engines = Callable[..., tuple[EngineSet, list[str]]]


@pytest.fixture
def engines(dit: CausalDiT) -> Engines:
    """Make the DiT's engines of a configuration, and the list of their calls."""

    def make(config: EngineConfig, *, with_pair: bool) -> tuple[EngineSet, list[str]]:
        timesteps = len(plan_variant(config.variant).timesteps)
        calls: list[str] = []
        networks = dit_networks(dit, config.geometry, precision="float32", timesteps=timesteps, with_pair=with_pair)
        return engine_set(config, networks, calls), calls

    return make


def embedding(config: EngineConfig, seed: int = 3) -> torch.Tensor:
    spec = config.variant.model.dit
    return torch.randn((1, spec.text_len, spec.text_dim), generator=torch.Generator().manual_seed(seed))


def initial_latents(config: EngineConfig, chunks: int) -> torch.Tensor:
    geometry = config.geometry
    shape = (1, chunks * geometry.chunk_frames, 16, geometry.latent_height, geometry.latent_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def clip(engines: EngineSet, config: EngineConfig, *, blocks: int, initial: int = 0, seed: int = 0) -> torch.Tensor:
    """Return the latents of a clip, a chunk each: [blocks, 1, F, C, h, w]."""
    given = initial_latents(config, initial) if initial else None
    with VideoSession(engines) as session:
        chunks = session.generate(embedding(config), total_blocks=blocks, initial_latents=given, seed=seed)
        return torch.stack([chunk.latents for chunk in chunks])


CLIPS: dict[str, tuple[EngineConfig, int, int]] = {
    "chunkwise": (make_config("tiny"), 4, 0),
    "chunkwise, behind given latents": (make_config("tiny"), 5, 2),
    "chunkwise, outgrowing the window": (make_config("tiny", window_frames=9), 6, 0),
    "chunkwise, room for exactly two": (make_config("tiny", window_frames=6), 4, 0),
    "chunkwise, no room for two": (make_config("tiny", window_frames=5), 3, 0),
    "chunkwise, behind a sink": (make_config("tiny", window_frames=12, sink_frames=3), 6, 0),
    "chunkwise, window and sink not of whole chunks": (make_config("tiny", window_frames=10, sink_frames=1), 6, 0),
    "framewise": (make_config("tiny-i2v"), 6, 0),
    "framewise, behind a given latent": (make_config("tiny-i2v"), 6, 1),
    "framewise, outgrowing the window": (make_config("tiny-i2v", window_frames=4), 8, 1),
    "framewise, behind a sink": (make_config("tiny-i2v", window_frames=5, sink_frames=2), 8, 0),
    "two chunks' context at a timestep": (make_config("tiny", {"context_timestep": 125.0}), 4, 1),
    "first chunk of other steps": (
        make_config("tiny", {"first_chunk_denoising_steps": (1000, 500), "denoising_steps": (1000, 800, 300)}), 4, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_clip_of_joint_passes_equals_the_clip_of_separate_ones(name: str, engines: Engines) -> None:
    config, blocks, initial = CLIPS[name]
    got = clip(engines(config, with_pair=True)[0], config, blocks=blocks, initial=initial)
    want = clip(engines(config, with_pair=False)[0], config, blocks=blocks, initial=initial)
    assert want.isfinite().all()
    assert (want[initial:].flatten(1).diff(dim=0).abs().amax(dim=1) > 1e-2).all(), "chunks differ"
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def expected_calls(config: EngineConfig, blocks: int, initial: int) -> list[str]:
    """Spell out which networks run, in order."""
    plan, geometry, calls = plan_variant(config.variant), config.geometry, []
    begun = False
    for index in range(blocks):
        generated = index - initial
        if generated >= 0:
            steps = len(plan.chunk if generated else plan.first_chunk)
            calls += ["dit_step"] * (steps - begun)
        has_room = (index + 2) * geometry.chunk_frames <= geometry.window_frames
        begun = has_room and generated >= -1
        if index + 1 < blocks:
            calls.append("dit_context_step" if begun else "dit_context")
    return calls


@pytest.mark.parametrize("name", CLIPS)
def test_passes_are_joint_wherever_the_window_has_room(name: str, engines: Engines) -> None:
    config, blocks, initial = CLIPS[name]
    engine_set, calls = engines(config, with_pair=True)
    clip(engine_set, config, blocks=blocks, initial=initial)
    assert calls == ["timestep_modulation", "prompt_kv", *expected_calls(config, blocks, initial)]


def test_expected_calls_cover_what_is_joint_and_what_falls_back() -> None:
    """The cases above are not all alike."""
    joint = {name: expected_calls(*case).count("dit_context_step") for name, case in CLIPS.items()}
    alone = {name: expected_calls(*case).count("dit_context") for name, case in CLIPS.items()}
    assert (joint["chunkwise"], alone["chunkwise"]) == (3, 0)
    assert (joint["chunkwise, behind given latents"], alone["chunkwise, behind given latents"]) == (3, 1)
    assert (joint["chunkwise, outgrowing the window"], alone["chunkwise, outgrowing the window"]) == (2, 3)
    assert (joint["chunkwise, room for exactly two"], alone["chunkwise, room for exactly two"]) == (1, 2)
    assert (joint["chunkwise, no room for two"], alone["chunkwise, no room for two"]) == (0, 2)


def test_separate_passes_never_call_what_is_not_there(engines: Engines) -> None:
    config, blocks, _ = CLIPS["chunkwise"]
    engine_set, calls = engines(config, with_pair=False)
    clip(engine_set, config, blocks=blocks)
    assert calls.count("dit_context") == blocks - 1
    assert calls.count("dit_step") == STEPS * blocks


def test_clip_of_the_same_session_again_is_the_same(engines: Engines) -> None:
    config, blocks, _ = CLIPS["chunkwise, outgrowing the window"]
    with VideoSession(engines(config, with_pair=True)[0]) as session:
        first, other, again = (
            [chunk.latents for chunk in session.generate(embedding(config), total_blocks=blocks, seed=seed)]
            for seed in (0, 1, 0)
        )
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_chunk_that_was_begun_is_forgotten_with_its_clip(engines: Engines) -> None:
    """A clip may be left behind a joint pass, and the next clip's chunk at the same frame start otherwise."""
    config = CLIPS["chunkwise"][0]
    frames, noise = config.geometry.chunk_frames, SeededNoise(0)
    latents = initial_latents(config, 1)

    def second_chunk(*, leave_one: bool) -> torch.Tensor:
        engine_set, _ = engines(config, with_pair=True)
        io_tensors = engine_set.bind()
        io_tensors["prompt_embeds"].copy_(embedding(config))
        engine_set.engines["prompt_kv"].enqueue()
        denoiser = Denoiser(engine_set, io_tensors)
        if leave_one:
            denoiser.denoise(0, 0, SeededNoise(9))
            denoiser.write_context(0, 1, SeededNoise(9), is_initial=False)
        denoiser.reset()
        assert not io_tensors["k_cache_00"].any()
        denoiser.take(0, latents)
        denoiser.write_context(0, None, noise, is_initial=True)
        denoiser.denoise(frames, 0, noise)
        return denoiser.latent.clone()

    assert torch.equal(second_chunk(leave_one=True), second_chunk(leave_one=False))


def test_noise_of_a_chunk_is_drawn_once_whichever_pass_begins_it(engines: Engines) -> None:
    config, blocks, _ = CLIPS["chunkwise, outgrowing the window"]
    drawn: list[int] = []

    class Noted:
        def fill(self, chunk_index: int, noise: torch.Tensor) -> None:
            drawn.append(chunk_index)
            SeededNoise(0).fill(chunk_index, noise)

    with VideoSession(engines(config, with_pair=True)[0]) as session:
        list(session.generate(embedding(config), total_blocks=blocks, noise=Noted()))
    assert drawn == list(range(blocks))


# --- tapes on the CPU -----------------------------------------------------------------------------------------------


class StatefulModule:
    """An engine that is a module, whose states may come out as new tensors."""

    def __init__(self, network: Network) -> None:
        self.spec = network.spec
        self._module = network.module

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        states = dict(self.spec.states)
        self._inputs = [io_tensors[io.name] for io in self.spec.inputs]
        self._targets = [io_tensors[states.get(io.name, io.name)] for io in self.spec.outputs]

    @torch.inference_mode()
    def enqueue(self) -> None:
        outputs = self._module(*self._inputs)
        for target, output in zip(self._targets, (outputs,) if torch.is_tensor(outputs) else outputs, strict=True):
            if output is not target:
                target.copy_(output)


@pytest.mark.parametrize("slug", ["tiny", "tiny-i2v"])
def test_session_of_tapes_on_the_cpu_makes_the_clip_of_the_modules(slug: str, tmp_path: Path) -> None:
    config = dataclasses.replace(make_config(slug), backend="cuda")
    source = RandomModels(model=config.variant.model, seed=0, dtype=torch.float32)
    networks = list(cut_networks(BuildJob(config=config, source=source, parts=("dit", "vae"))))
    tapes = TapeSet(tmp_path)
    artefacts = {network.spec.name: tapes.add(network) for network in networks}
    tapes.finish()
    weights, calls = DeviceWeights(tmp_path, CPU), list[str]()
    played: dict[str, Engine] = {
        n.spec.name: Counted(CudaEngine(weights, n.spec, tmp_path / artefacts[n.spec.name]), calls) for n in networks
    }
    modules: dict[str, Engine] = {n.spec.name: StatefulModule(n) for n in networks}
    clips: list[list[Chunk]] = []
    for chosen in (played, modules):
        made = dataclasses.replace(engine_set(config, networks, []), engines=chosen)
        with VideoSession(made) as session:
            clips.append(list(session.generate(embedding(config), total_blocks=3)))
    assert calls.count("dit_context_step") == calls.count("vae_decoder") == 2
    for got, want in zip(*clips, strict=True):
        torch.testing.assert_close(got.latents, want.latents, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(got.pixels, want.pixels, atol=TOLERANCE, rtol=TOLERANCE)
        assert want.pixels.std() > 0.01
