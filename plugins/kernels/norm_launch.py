"""Launch the kernels of `norms` over tensors: the GPU side of the fused ops in `dit_ops` and `fp8_ops`."""

from __future__ import annotations

import torch
import triton

from causal_forcing.plugins.fp8_ops import E4M3
from causal_forcing.plugins.kernels.norms import add_norm_kernel, quantize_kernel

_WARPS = 4


def launch_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Run `dit_ops.modulated_norm`."""
    return run_add_norm(x, shift=shift, scale=scale, eps=eps)[1]


def launch_add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `dit_ops.add_norm`."""
    return run_add_norm(x, branch, gate, weight=weight, bias=bias, shift=shift, scale=scale, eps=eps)


def launch_add_norm_quantize(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    multiplier: torch.Tensor | None,
    quantised_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `fp8_ops.add_norm_quantize`."""
    return run_add_norm(
        x,
        branch,
        gate,
        weight=weight,
        bias=bias,
        shift=shift,
        scale=scale,
        eps=eps,
        multiplier=multiplier,
        quantised_scale=quantised_scale,
    )


def launch_gelu_quantize(x: torch.Tensor, multiplier: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Run `fp8_ops.gelu_quantize`."""
    return run_quantize(x, multiplier, scale, gelu=True)


def launch_gated_add(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Run `dit_ops.gated_add`."""
    return run_add_norm(x, branch, gate, norm="none")[0]


def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Run `dit_ops.rms_norm`."""
    return run_add_norm(x, weight=weight, eps=eps, norm="rms")[1]


def run_add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    quantised_scale: float | None = None,
    eps: float = 0.0,
    norm: str = "layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `add_norm_kernel`; see `dit_ops.add_norm` for the arguments they share.

    Args:
        x: [..., L, dim].
        branch: [..., L, dim]; None adds nothing.
        gate: Factor on the branch.
        weight: Factor on what is normalised.
        bias: Added to what is normalised.
        shift: Added to what is normalised, by segment.
        scale: 1 + `scale` is a factor on what is normalised, by segment.
        multiplier: [dim], factor before quantisation.
        quantised_scale: What quantised values stand for: value · scale; None does not quantise.
        eps: Of the norm.
        norm: layer, rms or none.

    Returns:
        The sum, which is `x` where nothing is added, and the normalised sum, which is the sum where norm is none.
    """
    x = x.contiguous()
    dim, tokens = x.shape[-1], x.shape[-2]
    total = x if branch is None else torch.empty_like(x)
    out = total if norm == "none" else torch.empty_like(x, dtype=x.dtype if quantised_scale is None else E4M3)
    modulation = next((given for given in (gate, shift) if given is not None), None)
    segments = modulation.shape[0] if modulation is not None and modulation.dim() == 2 else 1
    add_norm_kernel[(x.numel() // dim,)](
        *(x, x if branch is None else branch.contiguous(), *(_or(tensor, x) for tensor in (gate, weight, bias))),
        *(_or(shift, x), _or(scale, x), _or(multiplier, x), total, out),
        *(_segment_stride(tensor) for tensor in (gate, shift, scale)),
        *(tokens, tokens // segments, eps, 1.0 if quantised_scale is None else 1.0 / quantised_scale),
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        HAS_BRANCH=branch is not None,
        HAS_GATE=gate is not None,
        NORM=norm,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        MODULATED=scale is not None,
        QUANTISED=quantised_scale is not None,
        HAS_MULTIPLIER=multiplier is not None,
        num_warps=_WARPS,
    )
    return total, out


def run_quantize(x: torch.Tensor, multiplier: torch.Tensor | None, scale: float, *, gelu: bool = False) -> torch.Tensor:
    """Launch `quantize_kernel`: `x` [..., dim] to e4m3 at a scale, after GELU where asked for; see `fp8_ops`."""
    dim = x.shape[-1]
    rows = x.reshape(-1, dim)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    block = min(2048, triton.next_power_of_2(dim))
    quantize_kernel[(rows.shape[0], triton.cdiv(dim, block))](
        *(rows, _or(multiplier, x), out, rows.stride(0), 1.0 / scale),
        DIM=dim,
        BLOCK=block,
        GELU=gelu,
        HAS_MULTIPLIER=multiplier is not None,
        num_warps=_WARPS,
    )
    return out


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose place in the kernel is never read if it is None."""
    return stand_in if tensor is None else tensor


def _segment_stride(modulation: torch.Tensor | None) -> int:
    return 0 if modulation is None or modulation.dim() == 1 else modulation.stride(0)
