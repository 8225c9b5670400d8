"""TensorRT in either flavour: the module, chosen once by the backend's name, its one logger, and its errors as text.

`tensorrt` and `tensorrt_rtx` have nearly the same API, so all code takes the module from here and none imports it. Its
objects are `Any`: the type stubs that exist are of 10.13, and older than half of what is called.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.errors import BackendUnavailableError, TensorRTError

LOGGER = logging.getLogger("causal_forcing.tensorrt")
"""Where TensorRT's own messages go; nowhere, if nobody listens."""
LOGGER.addHandler(logging.NullHandler())

DTYPES = {
    "float32": "FLOAT",
    "bfloat16": "BF16",
    "float16": "HALF",
    "float8_e4m3fn": "FP8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
"""Element type to TensorRT's name of it."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTLibrary:
    """One flavour of TensorRT, loaded."""

    backend: str
    """`tensorrt` or `tensorrt-rtx`."""
    trt: Any
    """The module."""
    logger: Any
    """Its one logger: TensorRT keeps the first that it is given, for the whole process."""
    recorder: Any
    """Its error recorder, for builders and runtimes; what they make inherits it.

    A builder is given it after its network's `OnnxParser` was made, never before: a parser made on a network that has
    a recorder ends in a segmentation fault when the network is freed (TensorRT-RTX 1.7.1)."""

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.backend == "tensorrt-rtx"

    def check(self, result: Result, what: str) -> Result:
        """Return the result of a call, or raise where it says that the call failed: None or False.

        Args:
            result: What the call returned.
            what: What it was to do, such as `build dit_step`.

        Raises:
            TensorRTError: It failed.
        """
        if result is None or result is False:
            raise TensorRTError(f"{self.trt.__name__} cannot {what}: {self.recorder.text() or 'it does not say why'}")
        return result

    def attempt(self, call: Callable[[], Result], what: str) -> Result:
        """Make a call that fails by its result or by raising.

        Raises:
            TensorRTError: It failed.
        """
        return self.check(self._call(call, what), what)

    def perform(self, call: Callable[[], object], what: str) -> None:
        """Make a call that returns nothing: it failed if it raises, or if the recorder notes an error meanwhile.

        Raises:
            TensorRTError: It failed.
        """
        self.recorder.clear()
        self._call(call, what)
        if self.recorder.num_errors():
            self.check(None, what)

    def _call(self, call: Callable[[], Result], what: str) -> Result:
        try:
            return call()
        except (RuntimeError, TypeError, ValueError) as error:
            raised = " ".join(str(error).split())
            texts = [text for text in (raised, self.recorder.text()) if text]
            raise TensorRTError(f"{self.trt.__name__} cannot {what}: {'; '.join(texts)}") from error


@functools.cache
def load_library(backend: str) -> TensorRTLibrary:
    """Import a flavour of TensorRT and make its logger.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendUnavailableError: It is not installed, or its libraries cannot be loaded.
    """
    described = BACKENDS[backend]
    fix = f"pip install --upgrade {described.distributions[0]}"
    try:
        trt = importlib.import_module(described.module)
    except Exception as error:  # a package without its libraries raises whatever its loader does
        text = " ".join(str(error).split())
        raise BackendUnavailableError(
            f"{described.module} cannot be imported ({type(error).__name__}: {text}): {fix}"
        ) from error
    if not hasattr(trt, "Runtime"):  # a folder of that name, or type stubs, imports as an empty package
        raise BackendUnavailableError(f"{described.module} is a package without the library: {fix}")
    return TensorRTLibrary(backend=backend, trt=trt, logger=_make_logger(trt), recorder=_make_recorder(trt))


def _make_logger(trt: Any) -> Any:
    """Make a logger of the module's class that speaks through `logging`."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.CRITICAL,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.INFO,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            LOGGER.log(levels[severity], "%s", message)

    return Logger()


def _make_recorder(trt: Any) -> Any:
    """Make an error recorder of the module's class that can say all it noted."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._errors.clear()

        def report_error(self, code: Any, text: str) -> bool:
            self._errors.append((code, text))
            return False

        def text(self) -> str:
            """Return what was noted since the last time, in one line, and forget it."""
            noted = "; ".join(dict.fromkeys(" ".join(text.split()) for _, text in self._errors))
            self.clear()
            return noted

    return Recorder()
