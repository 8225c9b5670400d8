"""A network to a tape: traced with its fused ops whole, rewritten, and written down call by call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from causal_forcing.build_engines.cuda.constants import Constants
from causal_forcing.build_engines.cuda.fusion import fuse
from causal_forcing.build_engines.cuda.weight_file import WeightFile
from causal_forcing.build_engines.export import export_program
from causal_forcing.build_engines.networks import Network
from causal_forcing.plugins.fused_op import keep_fused_ops
from causal_forcing.runtime.tape import Call, Tape, Weight

CAPTURED = ("dit_", "prompt_kv", "vae_decoder")
"""How the names of networks begin that run once a chunk or more often."""

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
"""What tracing leaves behind to check itself."""

_CONVOLUTIONS = (
    *("aten.conv2d.default", "aten.conv3d.default", "aten.conv2d.padding", "aten.conv3d.padding"),
    "causal_forcing.conv_relu.default",
)


def write_tape(network: Network, weights: WeightFile) -> Tape:
    """Trace a network.

    Args:
        network: What to trace.
        weights: Where its constants go.
    """
    with keep_fused_ops():
        program = export_program(network)
    graph: Any = program.graph
    signature = program.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    constants: Constants = {name: (tensors[target],) for name, target in lifted.items()}
    fuse(graph, constants)
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    calls = _calls(graph)
    channels_last = _convolution_weights(calls)
    used = [node.name for node in graph.nodes if node.op == "placeholder" and node.users]
    (output,) = (node for node in graph.nodes if node.op == "output")
    return Tape(
        weight_file=weights.name,
        inputs=tuple(name for name in placeholders if name not in constants),
        weights={
            name: Weight(key=weights.add(parts), channels_last=name in channels_last)
            for name, parts in constants.items()
            if name in used
        },
        calls=tuple(calls),
        outputs=tuple(_value(part) for part in output.args[0]),
        captured=network.spec.name.startswith(CAPTURED),
    )


def _calls(graph: Any) -> list[Call]:
    calls = []
    for node in graph.nodes:
        if node.op != "call_function" or _is_getitem(node) or node.target is _ASSERTION:
            continue
        calls.append(
            Call(
                operator=str(node.target),
                arguments=tuple(_value(argument) for argument in node.args),
                keywords={name: _value(argument) for name, argument in node.kwargs.items()},
                results=_results(node),
            )
        )
    return calls


def _is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _results(node: fx.Node) -> tuple[str | None, ...]:
    parts = [user for user in node.users if _is_getitem(user)]
    if not parts:
        return (node.name,)
    assert len(parts) == len(node.users), f"{node.name} is read whole and in parts"
    names: dict[int, str] = {}
    for part in parts:
        index = part.args[1]
        assert isinstance(index, int), "results are picked by their place"
        names[index] = part.name
    return tuple(names.get(index) for index in range(max(names) + 1))


def _value(argument: Any) -> Any:
    """Return an argument in the form that tapes give it."""
    if isinstance(argument, fx.Node):
        return {"tensor": argument.name}
    if isinstance(argument, list | tuple):
        return [_value(part) for part in argument]
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.memory_format):
        return {"memory_format": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.layout):
        return {"layout": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.device):
        return {"device": None}
    assert argument is None or isinstance(argument, bool | int | float | str), f"a tape cannot hold {argument!r}"
    return argument


def _convolution_weights(calls: list[Call]) -> set[str]:
    return {call.arguments[1]["tensor"] for call in calls if call.operator in _CONVOLUTIONS}
