"""Engines of the `onnxruntime` backend: the exported ONNX graphs on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.network_spec import NetworkSpec

_ERROR_SEVERITY = 3


class OnnxRuntimeEngine:
    """An ONNX graph bound to a session's buffers through ONNX Runtime's IO binding; nothing is copied.

    Args:
        spec: The network.
        path: Its `.onnx` file; external data lies beside it.

    Raises:
        EngineDamagedError: ONNX Runtime cannot load the file.
    """

    def __init__(self, spec: NetworkSpec, path: Path) -> None:
        self.spec = spec
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERROR_SEVERITY
        # One pool of threads per engine: those that spin while another engine runs would take its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            text = str(error).splitlines()[0]
            raise EngineDamagedError(f"ONNX Runtime cannot load {path}: {text}; rebuild it with cf-build") from error
        self._binding = self._session.io_binding()
        self._carries: list[tuple[torch.Tensor, torch.Tensor]] = []

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`."""
        for io_tensor in self.spec.inputs:
            tensor = io_tensors[io_tensor.name]
            self._binding.bind_input(
                io_tensor.name, "cpu", 0, np.dtype(io_tensor.dtype), io_tensor.shape, tensor.data_ptr()
            )
        for io_tensor in self.spec.outputs:
            tensor = io_tensors[io_tensor.name]
            self._binding.bind_output(
                io_tensor.name, "cpu", 0, np.dtype(io_tensor.dtype), io_tensor.shape, tensor.data_ptr()
            )
        if not self.spec.in_place:
            self._carries = [(io_tensors[source], io_tensors[output]) for output, source in self.spec.states]

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        self._session.run_with_iobinding(self._binding)
        for state, new_state in self._carries:
            state.copy_(new_state)
