"""How ops are made known to torch.

`torch.library.custom_op` would do, but its ops import torch's compiler at their first call, which takes seconds of
every process start. The functions it is made of do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar, cast

import torch

from causal_forcing.plugins.contract import DOMAIN

P = ParamSpec("P")
R = TypeVar("R")


def define_op(
    name: str,
    body: Callable[P, R],
    *,
    fake: Callable[..., object],
    on_gpu: Callable[P, R] | None = None,
    mutates: Iterable[str] = (),
) -> Callable[..., R]:
    """Define `causal_forcing::NAME`, typed as its body is, and return the op.

    Args:
        name: Of the op.
        body: Runs it, anywhere. Neither an argument nor a view of one is returned.
        fake: Returns results of the right shapes and dtypes, for tracing.
        on_gpu: Runs it on CUDA tensors instead.
        mutates: Names of arguments that are changed in place.
    """
    qualified = f"{DOMAIN}::{name}"
    torch.library.define(qualified, torch.library.infer_schema(body, mutates_args=tuple(mutates)))
    torch.library.impl(qualified, "default", body)
    if on_gpu is not None:
        torch.library.impl(qualified, "cuda", on_gpu)
    torch.library.register_fake(qualified, fake)
    return cast("Callable[..., R]", getattr(getattr(torch.ops, DOMAIN), name))
