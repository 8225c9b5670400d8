"""A plan compiled in a process of its own.

A build that fails leaves TensorRT-RTX's global state unfit for the next one, a large one leaves its memory taken, and
one that crashes takes its process along; so every plan gets a fresh process, and what it logs comes back through a
pipe.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event as Flag

from causal_forcing.build_engines.plans.job import PlanJob, PlanReport
from causal_forcing.build_engines.plans.progress import Event
from causal_forcing.runtime.errors import CausalForcingError, PlanError
from causal_forcing.runtime.tensorrt_library import LOGGER

CANCEL_S = 10.0
"""How long a build that was cancelled may take to end by itself: TensorRT asks after every step."""


def compile_in_process(
    job: PlanJob,
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    target: Callable[[PlanJob, Connection, Flag], None] | None = None,
) -> PlanReport:
    """Compile one plan in a fresh process.

    An interrupt of this process cancels the build there before it goes on.

    Args:
        job: What to compile.
        on_event: Takes the builder's progress events.
        target: What the process runs, in place of the compiler: tests give one that crashes or hangs.

    Raises:
        PlanError: The build failed, or its process did.
        CausalForcingError: Whatever else the compiler raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    cancelled = context.Event()
    process = context.Process(target=target or _run, args=(job, sender, cancelled), name=f"plan {job.spec.name}")
    process.start()
    sender.close()  # so that the pipe ends when the process does
    try:
        outcome = _listen(receiver, on_event)
    except BaseException:
        cancelled.set()
        with contextlib.suppress(EOFError, OSError):
            while receiver.poll(CANCEL_S):  # a full pipe would keep it from ending
                receiver.recv()
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()
    if isinstance(outcome, PlanReport):
        return outcome
    if isinstance(outcome, CausalForcingError):
        raise outcome
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise PlanError(
        f"the process that compiled {job.spec.name} {how} without a word: is there enough memory? run it again"
    )


def _listen(receiver: Connection, on_event: Callable[[Event], None]) -> object:
    """Pass on what the process sends until it ends; returns its outcome, None if it gave none."""
    outcome: object = None
    while True:
        try:
            kind, content = receiver.recv()
        except EOFError:
            return outcome
        if kind == "event":
            on_event(content)
        elif kind == "log":
            if LOGGER.isEnabledFor(content.levelno):
                LOGGER.handle(content)
        else:
            outcome = content


def _run(job: PlanJob, sender: Connection, cancelled: Flag) -> None:
    """Compile in this process, which was made for it, and send what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which cancels
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(_PipeHandler(sender))
    from causal_forcing.build_engines.plans.compiler import compile_plan

    parent = multiprocessing.parent_process()

    def is_cancelled() -> bool:
        return cancelled.is_set() or (parent is not None and not parent.is_alive())

    outcome: object
    try:
        outcome = compile_plan(job, emit=lambda event: sender.send(("event", event)), is_cancelled=is_cancelled)
    except CausalForcingError as error:
        outcome = _portable(error)
    except Exception as error:  # whatever it was, the parent says it in one line
        outcome = PlanError(f"compiling {job.spec.name} failed: {type(error).__name__}: {error}")
    sender.send(("outcome", outcome))
    sender.close()
    # Left without tearing TensorRT down, which is known to crash where there is no driver.
    os._exit(0)


def _portable(error: CausalForcingError) -> CausalForcingError:
    """Return an error that survives a pipe: some take other arguments than their message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        portable = CausalForcingError(str(error))
        portable.exit_code = error.exit_code
        return portable
    return error


class _PipeHandler(logging.Handler):
    """Sends log records through a pipe."""

    def __init__(self, sender: Connection) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        record.exc_info = None
        with contextlib.suppress(OSError):
            self._sender.send(("log", record))
