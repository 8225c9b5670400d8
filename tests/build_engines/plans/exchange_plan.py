"""Compile one layer's self-attention, split over ranks by heads, with TensorRT-RTX: `exchange_plan.py RANKS`.

What `token_ops` does through NCCL, in layers of TensorRT: tokens are exchanged for heads by `IDistCollectiveLayer`, the
cache of this rank's heads is updated and attended to, and heads are exchanged for tokens. Prints shapes and plan size
as JSON. A process of its own: the builder's state is global. It cannot run here, for want of a GPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt_rtx as trt

HEADS, DEPTH, TOKENS, SLOTS = 12, 128, 1560, 6240


def main(ranks: int) -> None:
    """Build the plan and print what came out."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    share, own_heads = TOKENS // ranks, HEADS // ranks

    def shuffle(x: Any, shape: tuple[int, ...], order: tuple[int, ...]) -> Any:
        layer = network.add_shuffle(x)
        layer.reshape_dims, layer.second_transpose = shape, order
        return layer.get_output(0)

    def reshape(x: Any, shape: tuple[int, ...]) -> Any:
        layer = network.add_shuffle(x)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def exchange(blocks: Any) -> Any:
        operation, none = trt.CollectiveOperation.ALL_TO_ALL, trt.ReduceOperation.NONE
        layer = network.add_dist_collective(blocks, operation, none, -1, [])
        layer.num_ranks = ranks
        return layer.get_output(0)

    def to_heads(x: Any) -> Any:
        blocks = shuffle(x, (share, ranks, own_heads, DEPTH), (1, 0, 2, 3))  # [R, S, n, D]
        return shuffle(exchange(blocks), (1, TOKENS, own_heads, DEPTH), (0, 2, 1, 3))  # [1, n, L, D]

    q, k, v = (to_heads(network.add_input(name, trt.bfloat16, (share, HEADS * DEPTH))) for name in "qkv")
    place = network.add_input("slots", trt.int32, (1,))
    lengths = network.add_input("valid_slots", trt.int32, (1,))
    caches = []
    for name, new in (("k_cache", k), ("v_cache", v)):
        cache = network.add_input(name, trt.bfloat16, (1, own_heads, SLOTS, DEPTH))
        update = network.add_kv_cache_update(cache, new, place, trt.KVCacheMode.LINEAR).get_output(0)
        update.name = f"{name}_out"
        network.mark_output(update)
        caches.append(update)
    attention = network.add_attention(q, *caches, trt.AttentionNormalizationOp.SOFTMAX, False)
    attention.key_value_lengths = lengths
    blocks = shuffle(attention.get_output(0), (own_heads, ranks, share, DEPTH), (1, 2, 0, 3))  # [R, S, n, D]
    out = reshape(shuffle(exchange(blocks), (ranks, share, own_heads * DEPTH), (1, 0, 2)), (share, HEADS * DEPTH))
    out.name = "attended"
    network.mark_output(out)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    collectives = [network.get_layer(index) for index in range(network.num_layers)]
    print(
        json.dumps(
            {
                "heads": list(q.shape),
                "attended": list(out.shape),
                "collectives": sum(layer.type == trt.LayerType.DIST_COLLECTIVE for layer in collectives),
                "plan_bytes": 0 if plan is None else plan.nbytes,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
