"""This project's own torch modules as engines: what an engine is worth beside the code that it was made from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.models.dit_layers import Layer
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.quantization.passes import ModuleEngine
from causal_forcing.plugins.fused_op import keeps_fused_ops
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.manifest import Manifest


class RecordedEngine(ModuleEngine):
    """A torch module that is recorded into a CUDA graph at its second call and replayed from then on."""

    _graph: torch.cuda.CUDAGraph | None = None
    _has_run = False

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        if self._graph is None and self._has_run:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                super().enqueue()
        if self._graph is not None:
            self._graph.replay()
        else:
            super().enqueue()
            self._has_run = True


def cut_modules(job: BuildJob, device: torch.device) -> list[Network]:
    """Return the networks of a job with their modules, and their weights once, on a device."""
    networks = list(cut_networks(job))
    for network in networks:
        network.module.to(device).eval()
    return networks


def module_engines(
    job: BuildJob, networks: list[Network], device: torch.device, *, compiler: str | None = None, in_graph: bool = False
) -> EngineSet:
    """Return a set of engines around modules; sets made from the same networks share their weights.

    Args:
        job: What the networks were cut from.
        networks: From `cut_modules`.
        device: Where they are.
        compiler: Backend of torch.compile; None runs the modules as they are.
        in_graph: Whether engines are recorded into CUDA graphs, where there is CUDA.
    """
    modules = [network.module for network in networks]
    if compiler is not None:
        modules = compile_modules(modules, compiler)
    specs = [network.spec for network in networks]
    make = RecordedEngine if in_graph and device.type == "cuda" else ModuleEngine
    engines: dict[str, Engine] = {spec.name: make(spec, module) for spec, module in zip(specs, modules, strict=True)}
    manifest = Manifest(config=job.config, networks=tuple(specs), artefacts={}, files={})
    return EngineSet(folder=Path(), manifest=manifest, engines=engines, device=device)


def compile_modules(modules: list[nn.Module], compiler: str) -> list[nn.Module]:
    """Return copies of modules that share their weights and run through torch.compile.

    A DiT is compiled layer by layer, so that one compilation serves all its layers; other modules are compiled whole.
    """
    # Marks it: else every fused op breaks the graph.
    torch.compiler.assume_constant_result(keeps_fused_ops)  # type: ignore[no-untyped-call]
    weights = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    modules = copy.deepcopy(modules, weights)
    compiled: list[nn.Module] = []
    layers: set[Layer] = set()
    for module in modules:
        found = {part for part in module.modules() if isinstance(part, Layer)}
        layers |= found
        compiled.append(module if found else _compile(module, compiler))
    for layer in layers:
        for name in ("attend_self", "finish"):
            setattr(layer, name, _compile(getattr(layer, name), compiler))
    return compiled


def _compile(function: Any, compiler: str) -> Any:
    return torch.compile(function, dynamic=False, backend=compiler)
