"""The only place that prints: results to stdout, narration to stderr, one line for every error.

Exit codes: 0 ok, 1 failure, 2 usage, 3 environment, 130 interrupted (by SIGTERM 143: 128 + the signal's number). Colour
and live lines appear on terminals only. A terminal's drawing library is imported when something is drawn, so `--help`
and pipes do not pay for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import PurePath
from typing import NoReturn, TextIO

from causal_forcing.runtime.errors import CausalForcingError, OutputError
from causal_forcing.runtime.interruption import stoppable

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""
_hushed = False
"""Whether another process of the same run does the talking."""

PLAIN_INTERVAL_S = 2.0
"""Least time between two progress lines where there is no terminal."""


def run_program(entry: Callable[[], object]) -> NoReturn:
    """Run a program to its exit code, turning whatever goes wrong into one line on stderr.

    Args:
        entry: The program, usually `functools.partial(app, standalone_mode=False)` of a typer app. An int that it
            returns is the exit code; anything else counts as success.
    """
    _open_closed_streams()
    with stoppable() as received:
        try:
            result = entry()
            with _result_stream():
                pass  # a closed pipe shows here, not in the interpreter's shutdown
        except BaseException as error:
            code = _report(error)
        else:
            code = result if type(result) is int else 0
            if code == INTERRUPTED:  # typer turns Ctrl-C into this result
                narrate("interrupted")
    if code == INTERRUPTED and received:
        code = 128 + received[0]
    sys.exit(code)


def _report(error: BaseException) -> int:
    """Say in one line what ended the program, and return its exit code."""
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return 1
    line, code = explain(error)
    if _is_debugging() and line.startswith("error: ") and not callable(getattr(error, "format_message", None)):
        narrate("".join(traceback.format_exception(error)).rstrip())
    if line:
        narrate(line)
    return code


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line that says what ended a program, empty if there is nothing to say, and the exit code."""
    if isinstance(error, KeyboardInterrupt) or _is_typer(error, "Abort"):
        return "interrupted", INTERRUPTED
    if _is_typer(error, "Exit"):
        return "", int(getattr(error, "exit_code", 0))
    if callable(getattr(error, "format_message", None)):  # a usage error; typer's own classes are private
        message = _usage_message(error)
        # Empty: called without a command, and typer has just shown the help.
        return f"error: {message} (see --help)" if message else "", int(getattr(error, "exit_code", 2))
    if isinstance(error, CausalForcingError):
        return "" if error.said else f"error: {_one_line(str(error))}", error.exit_code
    text = _one_line(str(error))
    if _is_out_of_memory(error):
        return f"error: out of memory ({text or type(error).__name__}): free some, or ask for a smaller video", 3
    again = "" if _is_debugging() else " (run again with --debug for the traceback)"
    return f"error: unexpected {type(error).__name__}: {text or 'no message'}{again}", 1


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Print and narrate nothing meanwhile: of several processes that do one thing together, one talks."""
    global _hushed
    before, _hushed = _hushed, True
    try:
        yield
    finally:
        _hushed = before


def _usage_message(error: BaseException) -> str:
    """Return typer's message in one line, with what it leaves out: the nearest option, the value that was given.

    The attributes read here are those of typer's exceptions since it took over click's; an absent one adds nothing.
    """
    message = _one_line(str(error.format_message()))  # type: ignore[attr-defined]
    option = getattr(error, "option_name", None)
    if option and hasattr(error, "possibilities"):
        parameters = getattr(getattr(getattr(error, "ctx", None), "command", None), "params", [])
        known = [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
        return f"no such option {option}" + (f": did you mean {near[0]}?" if near else "")
    spellings = getattr(getattr(error, "param", None), "opts", [])
    details = getattr(error.__cause__, "errors", None)  # pydantic's, which typer parses values with
    if spellings and callable(details):
        detail = details()[0]
        return f"{spellings[-1]} {detail['input']!r} is not valid: {_one_line(detail['msg'])}"
    if "extra argument" in message:
        return f"{message}: put a text of several words in quotes"
    return message


def _is_out_of_memory(error: BaseException) -> bool:
    # Torch has a class of that name for GPUs, and a RuntimeError for the CPU.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _is_typer(error: BaseException, name: str) -> bool:
    # If typer was never imported, the error cannot be one of its.
    kind = getattr(sys.modules.get("typer"), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _is_debugging() -> bool:
    return "--debug" in sys.argv[1:] or os.environ.get("CF_DEBUG") == "1"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _open_closed_streams() -> None:
    """Give a program that was started with stdout or stderr closed (`>&-`) a stream that goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the program's life)


@contextlib.contextmanager
def _result_stream() -> Iterator[None]:
    """Flush stdout after the block, and say what keeps a result from being written there."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence_stdout()
        raise OutputError(f"cannot write the result to stdout: {error.strerror}; send it elsewhere") from error


def _silence_stdout() -> None:
    """Point stdout at nothing, or the interpreter complains of the closed pipe while it shuts down."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def narrate(text: str, *, aloud: bool = False) -> None:
    """Say what is going on: a line on stderr, while hushed only if it is to be said `aloud`."""
    if _hushed and not aloud:
        return
    with contextlib.suppress(OSError):  # nobody is listening, which is no reason to stop
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Say what the user may want to change: a line on stderr."""
    narrate(f"warning: {text}")


def print_line(text: object) -> None:
    """Print a result of one line."""
    if _hushed:
        return
    with _result_stream():
        print(text)


def print_json(obj: object) -> None:
    """Print a result as JSON; dataclasses, paths and enums included."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print_line(json.dumps(obj, indent=2, ensure_ascii=not is_unicode, default=_as_json))


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a result as a table: aligned plain text in a pipe, drawn on a terminal.

    Args:
        headers: One per column.
        rows: Cells, turned into text; None is an empty cell.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        assert len(row) == len(headers), f"a row of {len(row)} cells under {len(headers)} headers"
    if not is_terminal(sys.stdout):
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (headers, *cells))
        print_line("\n".join("  ".join(line).rstrip() for line in padded))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for header in headers:
        table.add_column(Text(header))  # Text: brackets in it are not markup
    for row in cells:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout).print(table)


def flush() -> None:
    """Let out what was printed, before the process ends without winding up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can draw."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
