"""Ops as torch knows them: defined without torch's compiler, which would cost seconds of every process start."""

import subprocess
import sys

import torch

from causal_forcing.plugins.dit_ops import gated_add

PROGRAM = """
import sys, torch
from causal_forcing.plugins.fused_op import register_fused_ops
register_fused_ops()
x = torch.ones(1, 4, 8)
torch.ops.causal_forcing.gated_add(x, x, x[0, 0])
torch.ops.causal_forcing.kv_cache_attention_(
    *(torch.ones(1, 1, 4, 8) for _ in range(5)), torch.tensor([0]), torch.tensor([4]), 1.0
)
print(*(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
"""


def test_running_ops_does_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_op_is_its_body_and_traces_with_shapes_alone() -> None:
    op = torch.ops.causal_forcing.gated_add
    x, branch, gate = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(8)
    assert torch.equal(op(x, branch, gate), gated_add(x, branch, gate))
    torch.library.opcheck(op.default, (x, branch, gate), test_utils=("test_schema", "test_faketensor"))


def test_op_that_mutates_says_so() -> None:
    schema = torch.ops.causal_forcing.kv_cache_attention_.default._schema
    assert [argument.name for argument in schema.arguments if argument.is_write] == ["k_cache", "v_cache"]
