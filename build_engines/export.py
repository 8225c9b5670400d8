"""Torch modules to exported programs, and those to ONNX files that carry the op's function body."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnxscript import rewriter

from causal_forcing.build_engines.networks import Network, example_inputs
from causal_forcing.build_engines.quantization import fp8_attention, fp8_linear
from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME
from causal_forcing.plugins.onnx_bodies import OPSET, function_body
from causal_forcing.plugins.onnx_function import translation_table

IR_VERSION = 11
"""ONNX IR of opset 24's era; the exporter writes 10."""

EXTERNAL_DATA_BYTES = 1 << 30
"""Weights above this go to a file of their own: protobuf ends at 2 GiB."""

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Where the exporter notes the source lines that a node comes from."""

SLOW_RULE = "SlicesSplit"
"""The rule of onnxscript's optimiser that is tried on every pair of nodes, by its name."""


def export_program(network: Network) -> torch.export.ExportedProgram:
    """Trace a network with static shapes; caches in and out, nothing mutated."""
    with torch.no_grad(), _quiet():
        program = torch.export.export(network.module.eval(), example_inputs(network.spec), strict=False)
    # They would be saved with the program: gigabytes of caches.
    program.example_inputs = None
    return program


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program, weights included, as `.pt2`."""
    with _quiet():
        torch.export.save(program, path)


def save_onnx(program: torch.export.ExportedProgram, network: Network, path: Path, *, cache_writes: int) -> None:
    """Translate an exported program to ONNX opset 24 and write it, checked.

    Args:
        program: The network's program; emptied of its weights' only other reference by the caller if memory is short.
        network: Names of inputs and outputs.
        path: File to write; large weights go to `path` + `.data` beside it.
        cache_writes: See `plugins.onnx_function.function_body`.
    """
    spec = network.spec
    with torch.no_grad(), _quiet(), _without_slow_rule():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={
                **translation_table(),
                **fp8_linear.translation_table(),
                **fp8_attention.translation_table(),
            },
            input_names=[io_tensor.name for io_tensor in spec.inputs],
            output_names=[io_tensor.name for io_tensor in spec.outputs],
            optimize=True,
            verbose=False,
        )
    assert exported is not None, "the dynamo exporter returns a program"
    model = exported.model
    model.ir_version = IR_VERSION
    if any(node.domain == DOMAIN and node.op_type == ONNX_NAME for node in model.graph):
        model.functions[(DOMAIN, ONNX_NAME, "")] = onnx_ir.serde.deserialize_function(
            function_body(writes=cache_writes)
        )
    for node in model.graph:
        # Paths and line numbers of the machine that exports: graphs that compute the same shall be the same.
        node.metadata_props.pop(STACK_TRACE, None)
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with _quiet():
        exported.save(path, external_data=weight_bytes > EXTERNAL_DATA_BYTES)
    onnx.checker.check_model(str(path), full_check=weight_bytes <= EXTERNAL_DATA_BYTES)


@contextlib.contextmanager
def _without_slow_rule() -> Iterator[None]:
    """Keep `SLOW_RULE` out of the optimiser: none of our graphs has what it looks for, two `Slice` that make a `Split`.

    Its time grows with the square of the nodes: 20 of the 33 seconds that the graph of 30 layers took, weights apart.
    """
    rules = rewriter._DEFAULT_REWRITE_RULES
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != SLOW_RULE)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress talk and its warnings about itself off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
