"""Register KVCacheAttention with TensorRT, as one of two plugins of the same name.

`register_plugin`: the IPluginV3 of `v3_plugin`, whose plans need Python and Triton where they run.
`quick_plugin.register_quick_plugin`: the quick plugin, whose plans carry the compiled kernel and need neither.

TensorRT's registry knows a plugin by name, version and namespace, so a process can have one of the two. TensorRT-RTX
has a registry as well, and a parser that asks it for plugins, but none that runs: it ends the process.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME, PLUGIN_VERSION

if TYPE_CHECKING:
    import tensorrt

_registered: dict[str, object] = {}
"""Creators by kind. TensorRT keeps no reference to a creator written in Python: without ours it would be freed."""


def register_plugin(trt: ModuleType) -> None:
    """Register the IPluginV3 with TensorRT, if it is not yet.

    Args:
        trt: The module `tensorrt`.

    Raises:
        RuntimeError: It is TensorRT-RTX, or has another plugin of this name.
    """
    if must_register(trt, "IPluginV3"):
        creator = plugin_creator(trt)
        if not trt.get_plugin_registry().register_creator(creator, DOMAIN):
            raise RuntimeError(f"{trt.__name__} does not take the plugin {DOMAIN}::{ONNX_NAME}")
        keep_registered("IPluginV3", creator)


def plugin_creator(trt: ModuleType) -> tensorrt.IPluginCreatorV3One:
    """Return a new creator of the IPluginV3, for the module `tensorrt`."""
    _refuse_rtx(trt)
    from causal_forcing.plugins.v3_plugin import KVCacheAttentionCreator

    return KVCacheAttentionCreator()


def must_register(trt: ModuleType, kind: str) -> bool:
    """Say whether a kind of plugin is still to be registered.

    Raises:
        RuntimeError: The module is TensorRT-RTX, or has another plugin of this name.
    """
    _refuse_rtx(trt)
    if kind in _registered:
        return False
    if trt.get_plugin_registry().get_creator(ONNX_NAME, PLUGIN_VERSION, DOMAIN) is not None:
        others = ", ".join(_registered) or "made elsewhere"
        raise RuntimeError(
            f"{trt.__name__} has a plugin {DOMAIN}::{ONNX_NAME} already ({others}), expected none before {kind} is "
            "registered: use a process of its own for each"
        )
    return True


def keep_registered(kind: str, creator: object) -> None:
    """Keep the creator of a kind alive, as long as the process lives."""
    _registered[kind] = creator


def _refuse_rtx(trt: ModuleType) -> None:
    if trt.__name__ != "tensorrt":
        raise RuntimeError(
            f"{trt.__name__} runs no plugins and would end the process: it compiles the function body of {ONNX_NAME}"
        )
