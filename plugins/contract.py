"""The contract of `causal_forcing::KVCacheAttention`: one op, several bodies.

    out, k_cache', v_cache' = KVCacheAttention(q, k, v, k_cache, v_cache, slots, valid_slots, scale)

Inputs:
    q, k, v: [B, N, L, D], float. Queries, keys and values of a chunk of F latent frames, after RMS norm and RoPE;
        L = F · tokens_per_frame, frame-major.
    k_cache, v_cache: [B, N, S, D], the dtype of q. Keys are stored after RoPE.
    slots: [F] int32, on the device. First cache slot of each of the chunk's frames; a frame fills the
        tokens_per_frame slots from there on. Frames of a chunk never share a slot.
    valid_slots: [B] int32, on the device. The chunk attends to slots [0, valid_slots), its own among them.
    scale: float attribute, the factor on q·k.

Effect: k and v are written into their slots; every query attends to every valid slot without a mask inside the chunk.
Keys carry their absolute RoPE phase and attention does not depend on the order of keys, so the cache can be a ring
behind the sink frames in which nothing is ever shifted. What lies beyond `valid_slots` changes nothing as long as it is
finite (a masked value counts as 0 · v), so caches start as zeros.

Outputs: out [B, N, L, D], and the two caches, which alias their inputs wherever the body can write in place.

Bodies: `reference` (plain PyTorch, the oracle), `torch_op` (the torch custom op; on a GPU it launches the Triton kernel
in `kernels`), `onnx_bodies` (standard ONNX operators, carried inside every exported model, whose node is that of
`onnx_function`), `v3_plugin` and `quick_plugin` (TensorRT, over the same kernel; `tensorrt_plugin` registers them).
"""

DOMAIN = "causal_forcing"
"""Namespace of the torch op and domain of the ONNX op; free of dots, as TensorRT's quick plugins demand."""

ONNX_NAME = "KVCacheAttention"
"""ONNX op type. Unique on its own: TensorRT's parser ignores domains."""

PLUGIN_VERSION = "1"
"""Version a TensorRT plugin must register under to take the place of the function body."""

INPUTS = ("q", "k", "v", "k_cache", "v_cache", "slots", "valid_slots")
"""Input names, in order."""

OUTPUTS = ("out", "k_cache_out", "v_cache_out")
"""Output names, in order."""
