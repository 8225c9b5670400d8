"""KVCacheAttention as a quick plugin whose kernel is compiled ahead of time: a plan that holds it needs no Python.

What TensorRT (10.15 to 11.4) lets such a plugin do has shaped the kernel: one launch without a workspace; all input
pointers, then int32 functions of the input shapes, then all output pointers as its parameters. Slots and lengths are
inputs on the device; shapes and the scale are compiled in, so shapes must be static.

TensorRT's decorators read annotations as objects, so this module does not postpone them.
"""

from types import ModuleType

from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME
from causal_forcing.plugins.tensorrt_plugin import keep_registered, must_register

PLUGIN_ID = f"{DOMAIN}::{ONNX_NAME}"
"""Namespace and name; quick plugins have version 1, always."""


def register_quick_plugin(trt: ModuleType) -> None:
    """Register the quick plugin with TensorRT, if it is not yet.

    Args:
        trt: The module `tensorrt`; the GPU to compile for must be at hand while it builds.

    Raises:
        RuntimeError: It is TensorRT-RTX, or has another plugin of this name.
    """
    if not must_register(trt, "quick"):
        return
    import tensorrt.plugin as trtp

    elements = {trt.DataType.BF16: "bf16", trt.DataType.HALF: "fp16", trt.DataType.FLOAT: "fp32"}

    def describe(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        k_cache: trtp.TensorDesc,
        v_cache: trtp.TensorDesc,
        slots: trtp.TensorDesc,
        valid_slots: trtp.TensorDesc,
        scale: float,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
        return q.like(), k_cache.aliased(), v_cache.aliased()

    def compile_kernel(
        q: trtp.TensorDesc,
        k: trtp.TensorDesc,
        v: trtp.TensorDesc,
        k_cache: trtp.TensorDesc,
        v_cache: trtp.TensorDesc,
        slots: trtp.TensorDesc,
        valid_slots: trtp.TensorDesc,
        scale: float,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        from causal_forcing.plugins.kernels.ahead_of_time import compile_ahead_of_time

        if any(tensor.shape.is_dynamic for tensor in (q, k_cache, slots)):
            raise ValueError(
                f"{PLUGIN_ID} has a dynamic shape, expected static ones: they are compiled into its kernel"
            )
        kernel = compile_ahead_of_time(
            chunk=tuple(q.shape),
            frames=slots.shape[0],
            cache_slots=k_cache.shape[2],
            element=elements[q.dtype],
            scale=scale,
        )
        parameters = trtp.KernelLaunchParams(*kernel.grid, block_x=kernel.threads, shared_mem=kernel.shared_bytes)
        return kernel.name, kernel.ptx, parameters, trtp.SymIntExprs(0)

    trtp.register(PLUGIN_ID)(describe)
    trtp.aot_impl(PLUGIN_ID)(compile_kernel)
    keep_registered("quick", trtp)
