"""The door to TensorRT: what it says where there is no library, and the real classes of TensorRT-RTX without a GPU."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.runtime.errors import BackendUnavailableError, TensorRTError
from causal_forcing.runtime.tensorrt_library import DTYPES, TensorRTLibrary, load_library

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


@pytest.fixture(scope="module")
def rtx() -> TensorRTLibrary:
    return load_library("tensorrt-rtx")


def load_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTLibrary:
    """Load a `tensorrt` that lies in a folder, past the cache."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    try:
        library: TensorRTLibrary = load_library.__wrapped__("tensorrt")
        return library
    finally:
        sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise OSError('libnvinfer.so.11:\\n  cannot open')", r"OSError: libnvinfer\.so\.11: cannot open"),
        ("raise ModuleNotFoundError('tensorrt_libs')", "ModuleNotFoundError: tensorrt_libs"),
        ("", "tensorrt is a package without the library"),
        (None, "tensorrt is a package without the library"),
    ],
    ids=["no libraries", "a part missing", "an empty module", "type stubs"],
)
def test_library_that_is_broken_or_a_stub_says_so_in_a_line_with_the_command(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()
    if content is None:
        (tmp_path / "tensorrt" / "__init__.pyi").write_text("class Runtime: ...")
    else:
        (tmp_path / "tensorrt" / "__init__.py").write_text(content)
    with pytest.raises(BackendUnavailableError, match=f"{message}.*pip install --upgrade tensorrt") as caught:
        load_from(tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


def test_library_that_is_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # an import of it fails
    with pytest.raises(BackendUnavailableError, match=r"tensorrt cannot be imported.*pip install --upgrade tensorrt"):
        load_library.__wrapped__("tensorrt")


@needs_rtx
def test_library_is_loaded_once(rtx: TensorRTLibrary) -> None:
    assert load_library("tensorrt-rtx") is rtx
    assert rtx.is_rtx


@needs_rtx
def test_logger_speaks_through_logging_at_the_same_level(
    rtx: TensorRTLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "causal_forcing.tensorrt"):
        for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
            rtx.logger.log(getattr(rtx.trt.ILogger, severity), f"{severity} %s")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("CRITICAL", "INTERNAL_ERROR %s"),
        ("ERROR", "ERROR %s"),
        ("WARNING", "WARNING %s"),
        ("INFO", "INFO %s"),
        ("DEBUG", "VERBOSE %s"),
    ]


@needs_rtx
def test_failed_call_carries_what_the_recorder_noted_and_forgets_it(rtx: TensorRTLibrary) -> None:
    runtime = rtx.attempt(lambda: rtx.trt.Runtime(rtx.logger), "start its runtime")
    rtx.perform(lambda: setattr(runtime, "error_recorder", rtx.recorder), "record errors")
    with pytest.raises(TensorRTError, match=r"tensorrt_rtx cannot load nothing: .*empty memory buffer") as caught:
        rtx.attempt(lambda: runtime.deserialize_cuda_engine(b""), "load nothing")
    assert "\n" not in str(caught.value)
    assert rtx.recorder.text() == ""
    assert caught.value.exit_code == 1


@needs_rtx
def test_call_that_returns_nothing_fails_by_what_the_recorder_notes_meanwhile(rtx: TensorRTLibrary) -> None:
    rtx.recorder.report_error(rtx.trt.ErrorCodeTRT.INTERNAL_ERROR, "of an earlier call")
    rtx.perform(lambda: None, "do nothing")
    code = rtx.trt.ErrorCodeTRT.INVALID_ARGUMENT
    with pytest.raises(TensorRTError, match="cannot set something: too large"):
        rtx.perform(lambda: rtx.recorder.report_error(code, "too\n large"), "set something")
    rtx.perform(lambda: None, "do nothing")


@needs_rtx
def test_call_that_raises_is_told_like_one_that_fails(rtx: TensorRTLibrary) -> None:
    with pytest.raises(TensorRTError, match=r"tensorrt_rtx cannot start its runtime: .*incompatible constructor"):
        rtx.attempt(lambda: rtx.trt.Runtime(3), "start its runtime")
    with pytest.raises(TensorRTError, match="tensorrt_rtx cannot do it: it does not say why"):
        rtx.check(False, "do it")
    assert rtx.check(0, "count") == 0, "zero is a result"


@needs_rtx
def test_every_member_that_an_engine_calls_is_there(rtx: TensorRTLibrary) -> None:
    trt: Any = rtx.trt
    members = {
        trt.Runtime: ("deserialize_cuda_engine", "get_engine_validity", "error_recorder"),
        trt.ICudaEngine: (
            *("num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"),
            *("get_tensor_location", "get_aliased_input_tensor", "device_memory_size_v2", "create_runtime_config"),
            "create_execution_context",
        ),
        trt.IExecutionContext: ("set_tensor_address", "set_device_memory", "execute_async_v3"),
        trt.IRuntimeConfig: (
            *("set_execution_context_allocation_strategy", "cuda_graph_strategy", "create_runtime_cache"),
            "set_runtime_cache",
        ),
        trt.IRuntimeCache: ("serialize", "deserialize"),
        trt.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
        trt.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE",),
        trt.EngineValidity: ("INVALID",),
        trt.EngineInvalidityDiagnostics: ("VERSION_MISMATCH", "UNSUPPORTED_CC", "MALFORMED_ENGINE", "__members__"),
        trt.TensorIOMode: ("INPUT", "OUTPUT"),
        trt.TensorLocation: ("DEVICE",),
        trt.DataType: tuple(DTYPES.values()),
    }
    assert [
        f"{kind.__name__}.{name}" for kind, names in members.items() for name in names if not hasattr(kind, name)
    ] == []


@needs_rtx
def test_validity_of_what_is_no_plan_is_malformed(rtx: TensorRTLibrary) -> None:
    validity, diagnostics = rtx.trt.Runtime(rtx.logger).get_engine_validity(b"not a plan")
    assert validity == rtx.trt.EngineValidity.INVALID
    assert diagnostics & int(rtx.trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


@needs_rtx
def test_interpreter_that_used_builder_parser_and_runtime_ends_cleanly() -> None:
    """A recorder that is given to the builder before the parser exists ends in a segmentation fault instead."""
    script = (
        "from causal_forcing.runtime.tensorrt_library import load_library\n"
        "library = load_library('tensorrt-rtx')\n"
        "trt = library.trt\n"
        "builder = trt.Builder(library.logger)\n"
        "network = builder.create_network(0)\n"
        "parser = trt.OnnxParser(network, library.logger)\n"
        "builder.error_recorder = library.recorder\n"
        "assert not parser.parse(b'not ONNX')\n"
        "runtime = trt.Runtime(library.logger)\n"
        "runtime.error_recorder = library.recorder\n"
        "assert runtime.deserialize_cuda_engine(b'') is None and library.recorder.text()\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
