"""Attention for Hopper GPUs without one: compiled for sm_90a, and what its launcher accepts and lays out."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.plugins.kernels import hopper_launch
from tests import triton_interpreter

try:
    hopper: Any = importlib.import_module("causal_forcing.plugins.kernels.hopper_attention")
except (ImportError, AttributeError):
    hopper = None

needs_triton = pytest.mark.skipif(hopper is None, reason="needs Triton 3.6 or newer")

BITS = {"bf16": 16, "fp16": 16, "fp8e4nv": 8}
H100_SHARED_BYTES = 232448
TENSORS = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float8_e4m3fn: torch.bfloat16}
"""The type of out, by that of q."""


def compile_for_hopper(kernel: Any, element: str, constants: dict[str, int | bool]) -> Any:
    """Compile a kernel for sm_90 with queries, keys and values of this type."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS[element], rank=2)

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return f"tensordesc<{element}[{64 if name == 'q_desc' else 128}, 128],{layout!r}>"
        return {"valid_ptr": "*i32", "out_ptr": "*bf16", "scale": "fp32"}.get(
            name, "*fp32" if name.endswith("_ptr") else "i32"
        )

    signature = {name: kind(name) for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})


@needs_triton
@pytest.mark.parametrize("element", ["bf16", "fp8e4nv"])
def test_attention_kernel_compiled_for_hopper_multiplies_and_loads_asynchronously(element: str) -> None:
    stages = hopper_launch._STAGES[BITS[element] // 8]
    constants = {"SEGMENTS": 1, "STAGES": stages, "FP8": element == "fp8e4nv"}
    compiled = compile_for_hopper(hopper.attention_kernel, element, constants)
    ptx = compiled.asm["ptx"]
    operand = {"bf16": "k16.f32.bf16.bf16", "fp8e4nv": "k32.f32.e4m3.e4m3"}[element]
    assert f"wgmma.mma_async.sync.aligned.m64n128{operand}" in ptx
    assert "cp.async.bulk.tensor.2d.shared" in ptx
    assert "setmaxnreg" in ptx
    assert compiled.metadata.shared <= H100_SHARED_BYTES
    sass = compiled.asm["sass"]
    assert re.search(r"\b[HQ]GMMA\b", sass)
    # Triton 3.9 keeps one address that the loops over keys do not need in local memory: 1 store, 6 loads.
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) <= 7, "registers are spilled"


@needs_triton
def test_buffer_of_queries_is_free_only_when_scores_have_been_computed_from_their_registers() -> None:
    """Loads into registers may be on their way still when they have all been issued, and the next queries land on them.

    A tile cut into pieces of one block leaves so little between the two that rows of it were wrong once in 11 launches.
    """
    ptx = compile_for_hopper(hopper.attention_kernel, "bf16", {"SEGMENTS": 1, "STAGES": 3, "FP8": False}).asm["ptx"]
    consumers = re.findall(r"(?:ldmatrix[^\n]*\n\s*)+(.*?)mbarrier\.arrive", ptx, flags=re.DOTALL)
    assert len(consumers) == 2
    for until_something_is_free in consumers:
        assert "wgmma.wait_group" in until_something_is_free


def test_split_v_puts_slots_where_the_threads_that_hold_their_weights_read() -> None:
    slots, head_dim = 50, 8
    values = torch.arange(2 * 3 * slots * head_dim).view(2, 3, slots, head_dim)
    split = hopper_launch.split_v(values)
    assert split.shape == (2, 3, head_dim, 64)
    assert split.is_contiguous()
    for slot in range(slots):
        a, b, t, e = slot // 16, slot // 8 % 2, slot // 2 % 4, slot % 2
        assert torch.equal(split[..., 16 * a + 4 * t + 2 * b + e], values[:, :, slot])
    assert hopper_launch.split_v(values, columns=128)[..., 64:].eq(0).all()


def make_arguments(dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """Return what `accepts` says yes to, and changes to it."""
    q = torch.zeros(1, 300, 2, 128, dtype=dtype).transpose(1, 2)
    cache = torch.zeros(1, 2, 400, 128, dtype=dtype)
    return {
        "q": q,
        "k_cache": cache,
        "v_cache": hopper_launch.split_v(cache) if dtype == torch.float8_e4m3fn else cache,
        "valid": torch.zeros(1, dtype=torch.int32),
        "out": torch.zeros(1, 300, 2, 128, dtype=TENSORS[dtype]).transpose(1, 2),
        "capability": (9, 0),
    } | changes


@needs_triton
@pytest.mark.parametrize("dtype", TENSORS)
def test_accepts_says_yes_to_views_of_projections(dtype: torch.dtype) -> None:
    assert hopper_launch.accepts(**make_arguments(dtype))
    merged = torch.zeros(1, 300, 3, 2, 128, dtype=dtype)
    assert hopper_launch.accepts(**make_arguments(dtype, q=merged[:, :, 1].transpose(1, 2)))
    assert hopper_launch.accepts(**make_arguments(dtype, q=torch.zeros(1, 2, 300, 128, dtype=dtype)))


@pytest.mark.parametrize(
    "changes",
    [
        {"capability": (8, 9)},
        {"capability": (10, 0)},
        {"q": torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)},
        {"q": torch.zeros(2, 2, 300, 128, dtype=torch.bfloat16)},
        {"q": torch.zeros(1, 2, 300, 128)},
        {"q": torch.zeros(1, 2, 300, 132, dtype=torch.bfloat16)[..., 4:]},
        {"q": torch.zeros(1, 2, 300, 136, dtype=torch.bfloat16)[..., 1:129]},
        {"out": torch.zeros(1, 2, 300, 128)},
        {"out": torch.zeros(1, 2, 128, 300, dtype=torch.bfloat16).transpose(2, 3)},
        {"valid": torch.zeros(1, dtype=torch.int64)},
        {"valid": torch.zeros(3, dtype=torch.int32)},
        {"k_cache": torch.zeros(1, 400, 2, 128, dtype=torch.bfloat16).transpose(1, 2)},
        {"v_cache": torch.zeros(1, 2, 128, 400, dtype=torch.bfloat16)},
    ],
)
def test_accepts_says_no_to_what_the_kernel_cannot_run(changes: dict[str, Any]) -> None:
    assert not hopper_launch.accepts(**make_arguments(torch.bfloat16, **changes))


@needs_triton
def test_schedule_covers_all_work_once_and_evenly_and_its_pieces_combine() -> None:
    """In Triton's interpreter, and so in a process of its own."""
    triton_interpreter.require()
    script = Path(__file__).with_name("interpreted_combine.py")
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
