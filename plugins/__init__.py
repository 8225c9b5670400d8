"""`causal_forcing::KVCacheAttention`: its contract, and the bodies that carry it out.

Public: `kv_cache_attention`, the op for torch modules. It is imported when it is first asked for, because
`runtime.config` imports this package and no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from causal_forcing.plugins.torch_op import kv_cache_attention

__all__ = ["kv_cache_attention"]

if not TYPE_CHECKING:  # a checker that saw it would take any name for public

    def __getattr__(name: str) -> object:
        if name in __all__:
            from importlib import import_module

            return getattr(import_module("causal_forcing.plugins.torch_op"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
