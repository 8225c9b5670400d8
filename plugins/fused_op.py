"""Fused ops: functions with a plain-torch body that a traced graph may keep as one node, for a kernel to run.

A model calls the function. Usually its body runs, or is traced, operator by operator: that is what the `torch` and ONNX
backends get. Inside `keep_fused_ops` the call stays one node of the graph, `causal_forcing::NAME`, which runs the
op's kernel on a GPU and the same body elsewhere. So the body is the op's definition, its test oracle and its
implementation for CPUs, and there is one description of every model.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from causal_forcing.plugins.custom_op import define_op

P = ParamSpec("P")
R = TypeVar("R")

_MODULES = ("conv_ops", "dit_ops", "fp8_attention_ops", "fp8_ops", "linear_ops", "row_ops", "token_ops", "vae_ops")
"""Modules of this package that define ops of tapes."""

_keeping = contextvars.ContextVar("keeping", default=False)


@contextlib.contextmanager
def keep_fused_ops() -> Iterator[None]:
    """Let fused ops be nodes of what is traced or run inside."""
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)


def keeps_fused_ops() -> bool:
    """Say whether fused ops stay whole here."""
    return _keeping.get()


def register_fused_ops() -> None:
    """Make every op that a tape may hold known to torch, under `torch.ops.causal_forcing`."""
    for name in _MODULES:
        importlib.import_module(f"causal_forcing.plugins.{name}")


def kernel_of(module: str, function: str) -> Callable[..., Any]:
    """Return a function of a module in `kernels`, imported at its first call: Triton is not needed before."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"causal_forcing.plugins.kernels.{module}"), function)(*args)

    return launch


def kernel_or_body(kernel: Callable[..., Any], body: Callable[P, R]) -> Callable[P, R]:
    """Return what runs the kernel, and the body where that returns None: its tensors are not for it."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R | None = kernel(*args, **kwargs)
        return body(*args, **kwargs) if result is None else result

    return run


def fused_op(
    *, kernel: Callable[..., Any] | None = None, mutates: Iterable[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a fused op of a plain-torch function; its name, types and body are the function's.

    Args:
        kernel: Runs the op on CUDA tensors, called with all arguments by position; where it returns None the tensors
            are not for it, and the body runs. None leaves the op to its body.
        mutates: Names of arguments that are changed in place. Neither they nor views of any argument are returned.
    """

    def decorate(body: Callable[P, R]) -> Callable[P, R]:
        on_gpu = None if kernel is None else kernel_or_body(kernel, body)
        op = define_op(body.__name__, body, fake=body, on_gpu=on_gpu, mutates=mutates)

        @functools.wraps(body)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (op if keeps_fused_ops() else body)(*args, **kwargs)

        return call

    return decorate
