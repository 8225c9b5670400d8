"""Kernels that attend one chunk to a cache: this project's, torch's, and those of libraries that are installed.

Each is a function of a `Case` that returns the call to time, or raises `UnavailableError`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from causal_forcing.plugins.kernels.tiles import MAX_FRAMES
from causal_forcing.plugins.torch_op import kv_cache_attention_in_place

Call = Callable[[], Any]


class UnavailableError(Exception):
    """A kernel is not here, or does not take the case; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One chunk's attention, with random inputs."""

    q: torch.Tensor
    """[1, N, L, D]."""
    k: torch.Tensor
    """[1, N, L, D], the chunk's own keys."""
    v: torch.Tensor
    """[1, N, L, D], the chunk's own values."""
    k_cache: torch.Tensor
    """[1, N, S, D]."""
    v_cache: torch.Tensor
    """[1, N, S, D]."""
    slots: torch.Tensor
    """[F] int32, where the chunk's frames lie."""
    keys: int
    """Slots attended to, the chunk's included."""

    @property
    def scale(self) -> float:
        """Factor on q·k."""
        return float(self.q.shape[-1] ** -0.5)

    @property
    def valid_slots(self) -> torch.Tensor:
        """[1] int32, on the device."""
        return torch.tensor([self.keys], dtype=torch.int32, device=self.q.device)

    @property
    def flop(self) -> int:
        """Operations of both products."""
        _, heads, queries, head_dim = self.q.shape
        return 4 * heads * queries * self.keys * head_dim

    def attended(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values that are attended to, [1, N, keys, D], views of the caches."""
        return self.k_cache[:, :, : self.keys], self.v_cache[:, :, : self.keys]


def own_op(case: Case) -> Call:
    """Run the op as the torch backend does; it writes the chunk into the cache too."""
    if case.q.is_cuda and len(case.slots) > MAX_FRAMES:
        raise UnavailableError(f"a chunk of more than {MAX_FRAMES} latent frames goes to the reference")
    valid = case.valid_slots
    tensors = (case.q, case.k, case.v, case.k_cache, case.v_cache, case.slots, valid)
    return lambda: kv_cache_attention_in_place(*tensors, case.scale)


def sdpa(backend: SDPBackend) -> Callable[[Case], Call]:
    """Return what runs one backend of torch's scaled_dot_product_attention."""

    def make(case: Case) -> Call:
        if backend is SDPBackend.MATH and case.q.is_cuda:
            raise UnavailableError("it holds all weights in memory: for CPUs only")
        keys, values = case.attended()

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(case.q, keys, values, scale=case.scale)

        try:
            call()
        except RuntimeError as error:
            raise UnavailableError(str(error).splitlines()[0]) from error
        return call

    return make


def hopper(case: Case) -> Call:
    """Run this project's kernel for Hopper, in the type of the inputs; the keys lie in the cache already."""
    launch = _hopper(case)
    k_cache, v_cache, valid, out = case.k_cache, case.v_cache, case.valid_slots, torch.empty_like(case.q)
    _check_accepted(launch, case.q, k_cache, v_cache, valid, out)
    workspace = _workspace(launch, case.q.device)

    def call() -> torch.Tensor:
        launch.attend(case.q, k_cache, v_cache, valid, out, workspace, scale=case.scale)
        return out

    return call


def hopper_fp8(case: Case) -> Call:
    """Run this project's fp8 kernel for Hopper: scales of 1, which random normal numbers fit."""
    launch = _hopper(case)
    q, k_cache, v_cache = (tensor.to(torch.float8_e4m3fn) for tensor in (case.q, case.k_cache, case.v_cache))
    # As bytes: torch has not every operation for e4m3.
    v_cache = launch.split_v(v_cache.view(torch.uint8)).view(torch.float8_e4m3fn)
    valid, out = case.valid_slots, torch.empty_like(case.q)
    _check_accepted(launch, q, k_cache, v_cache, valid, out)
    workspace = _workspace(launch, q.device)
    ones = torch.ones(q.shape[1], device=q.device)
    factors = ones * (case.scale * math.log2(math.e))

    def call() -> torch.Tensor:
        launch.attend_fp8(q, k_cache, v_cache, valid, out, workspace, factors=factors, value_scales=ones)
        return out

    return call


def flash_attention_cute(case: Case) -> Call:
    """Run FlashAttention's CuTe kernel (flash-attn-4)."""
    interface = _import("flash_attn.cute")
    keys, values = (tensor.transpose(1, 2).contiguous() for tensor in case.attended())
    q = case.q.transpose(1, 2).contiguous()
    return lambda: _first(interface.flash_attn_func(q, keys, values, softmax_scale=case.scale)).transpose(1, 2)


def cudnn_frontend(case: Case) -> Call:
    """Run cuDNN's attention through its own front end."""
    return _cudnn(case, fp8=False)


def cudnn_frontend_fp8(case: Case) -> Call:
    """Run cuDNN's attention, e4m3 in and out."""
    return _cudnn(case, fp8=True)


KERNELS: dict[str, Callable[[Case], Call]] = {
    "op": own_op,
    "hopper": hopper,
    "hopper_fp8": hopper_fp8,
    "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": sdpa(SDPBackend.MATH),
    "flash_attn_cute": flash_attention_cute,
    "cudnn_frontend": cudnn_frontend,
    "cudnn_frontend_fp8": cudnn_frontend_fp8,
}
"""By the name that they have in records."""

FP8_KERNELS = ("hopper_fp8", "cudnn_frontend_fp8")
"""Those that round their inputs: their difference is not that of the others."""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"no {name}: {error}") from error


def _first(result: Any) -> torch.Tensor:
    out = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(out, torch.Tensor), f"a kernel returned {type(out)}"
    return out


def _hopper(case: Case) -> Any:
    if not case.q.is_cuda:
        raise UnavailableError("it is for GPUs")
    return _import("causal_forcing.plugins.kernels.hopper_launch")


def _check_accepted(launch: Any, *tensors: torch.Tensor) -> None:
    if not launch.accepts(*tensors, capability=torch.cuda.get_device_capability(tensors[0].device)):
        raise UnavailableError("it does not take this GPU, type, or shape")


def _workspace(launch: Any, device: torch.device) -> torch.Tensor:
    size = launch.workspace_bytes(launch.count_programs(device.index or 0))
    return torch.empty(size, dtype=torch.uint8, device=device)


def _cudnn(case: Case, *, fp8: bool) -> Call:
    """Build a graph of cuDNN's front end for a case."""
    cudnn = _import("cudnn")
    keys, values = case.attended()
    dtype = torch.float8_e4m3fn if fp8 else case.q.dtype
    q, keys, values = (tensor.to(dtype).contiguous() for tensor in (case.q, keys, values))
    out = torch.empty_like(q)
    kind = {
        torch.float8_e4m3fn: cudnn.data_type.FP8_E4M3,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
    }[dtype]
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT
    )
    tensors = {name: graph.tensor_like(tensor) for name, tensor in (("q", q), ("k", keys), ("v", values))}
    pointers = {tensors["q"]: q, tensors["k"]: keys, tensors["v"]: values}
    options: dict[str, Any] = {"name": "sdpa", "attn_scale": case.scale, **tensors}
    if fp8:
        one = torch.ones(1, 1, 1, 1, device=q.device)
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        scales = {name: graph.tensor_like(one) for name in names}
        pointers |= dict.fromkeys(scales.values(), one)
        # Without statistics for a backward pass, as `is_inference` of the other call.
        result, _, amax_s, amax_o = graph.sdpa_fp8(**options, **scales, is_inference=True)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(cudnn.data_type.FLOAT)
            pointers[amax] = torch.empty(1, 1, 1, 1, device=q.device)
    else:
        result, _ = graph.sdpa(**options, is_inference=True)
    result.set_output(True).set_dim(out.size()).set_stride(out.stride())
    pointers[result] = out
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), device=q.device, dtype=torch.uint8)

    def call() -> torch.Tensor:
        graph.execute(pointers, workspace)
        return out

    return call
