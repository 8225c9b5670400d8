"""A model's networks twice: as modules, and as tapes that an engine of the `cuda` backend plays on the CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.cuda.tape_set import TapeSet
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.network_spec import IOTensor
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.tape import Tape, read_tape

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """The networks of a model, and the folder of their tapes."""

    networks: dict[str, Network]
    geometry: Geometry
    folder: Path
    artefacts: dict[str, str]

    def tape(self, name: str) -> Tape:
        return read_tape(self.folder / self.artefacts[name])

    @functools.cached_property
    def engines(self) -> dict[str, CudaEngine]:
        """All engines of the folder, which share weights."""
        weights = DeviceWeights(self.folder, CPU)
        return {
            name: CudaEngine(weights, network.spec, self.folder / self.artefacts[name])
            for name, network in self.networks.items()
        }

    def inputs(self, name: str, seed: int = 0) -> list[torch.Tensor]:
        """Draw inputs of a network: frames anywhere in the cache, where it has one."""
        generator = torch.Generator().manual_seed(seed)
        geometry = self.geometry
        places = torch.randperm(geometry.window_frames, generator=generator)

        def draw(io_tensor: IOTensor) -> torch.Tensor:
            shape, dtype = io_tensor.shape, getattr(torch, io_tensor.dtype)
            if io_tensor.name.endswith("valid_slots"):
                # Of two chunks the later one lies in slots that the earlier one does not see.
                tokens = geometry.tokens_per_frame * geometry.chunk_frames
                return torch.tensor([tokens * (index + 1) for index in range(shape[0])], dtype=dtype)
            if io_tensor.name == "pair_slots":
                return (torch.arange(shape[0]) * geometry.tokens_per_frame).to(dtype)
            if io_tensor.name == "slots":
                return (places[: shape[0]] * geometry.tokens_per_frame).to(dtype)
            if io_tensor.name == "token_ids":
                return torch.randint(1, 200, shape, generator=generator)
            if io_tensor.name == "token_mask":
                return (torch.arange(shape[1]) < 9).to(dtype).expand(shape).clone()
            return torch.randn(shape, generator=generator).to(dtype)

        return [draw(io_tensor) for io_tensor in self.networks[name].spec.inputs]

    def expected(self, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return the outputs of the module by name."""
        network = self.networks[name]
        with torch.inference_mode():
            outputs = network.module(*self.inputs(name, seed))
        outputs = (outputs,) if torch.is_tensor(outputs) else outputs
        return dict(zip((io.name for io in network.spec.outputs), outputs, strict=True))

    def played(self, name: str, seed: int = 0, *, times: int = 1) -> dict[str, torch.Tensor]:
        """Return the outputs of the engine by name; a state is what its input's buffer then holds."""
        spec = self.networks[name].spec
        io_tensors = IOTensors([spec], CPU)
        engine = self.engines[name]
        engine.bind(io_tensors)
        for _ in range(times):
            for io_tensor, value in zip(spec.inputs, self.inputs(name, seed), strict=True):
                io_tensors[io_tensor.name].copy_(value)
            engine.enqueue()
        states = dict(spec.states)
        return {io.name: io_tensors[states.get(io.name, io.name)] for io in spec.outputs}


Record = Callable[..., Recorded]


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Cut and write a variant's networks, once for each choice of arguments."""

    @functools.cache
    def make(slug: str, precision: str, *, parts: tuple[str, ...], decoder: str = "wan", ranks: int = 1) -> Recorded:
        options = EngineOptions(
            slug=slug, backend="torch", precision=precision, pixel_height=16, pixel_width=32, decoder=decoder
        )
        # No GPU is here, nor does the backend offer fp32: the config is another backend's under its name.
        config = resolve_engine(options, weights="random:0", device="cpu")
        config = dataclasses.replace(config, backend="cuda", context_parallel=ranks)
        source = RandomModels(model=config.variant.model, seed=0, dtype=getattr(torch, config.dtype))
        folder = tmp_path_factory.mktemp("tapes")
        tapes, networks, artefacts = TapeSet(folder), {}, {}
        for network in cut_networks(BuildJob(config=config, source=source, parts=parts)):
            artefacts[network.spec.name] = tapes.add(network)
            networks[network.spec.name] = network
        tapes.finish()
        return Recorded(networks=networks, geometry=config.geometry, folder=folder, artefacts=artefacts)

    return make
