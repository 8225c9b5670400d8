"""Exit codes, one-line errors, and what reaches which stream."""

from __future__ import annotations

import enum
import functools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from causal_forcing.runtime.console import narrate, print_json, print_table, run_program, warn
from causal_forcing.runtime.errors import CausalForcingError, EngineMismatchError, UnknownNameError

Capture = pytest.CaptureFixture[str]


class Precision(enum.StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"


def run_app(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a small two-command program as `cf-build` is run, and return its exit code."""
    app = typer.Typer(no_args_is_help=True)

    @app.command()
    def build(slug: str, precision: Annotated[Precision, typer.Option()], seed: int = 0) -> None:
        if slug == "bad":
            raise typer.BadParameter("no such\nslug")
        if slug == "ctrl-c":
            raise KeyboardInterrupt

    @app.command()
    def plan() -> int:
        return 3

    monkeypatch.setattr(sys, "argv", ["cf-test", *arguments])
    return exit_code(functools.partial(app, standalone_mode=False))


def exit_code(entry: Callable[[], object]) -> int:
    with pytest.raises(SystemExit) as caught:
        run_program(entry)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def raising(error: BaseException) -> Callable[[], object]:
    def entry() -> object:
        raise error

    return entry


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cf-test"])
    monkeypatch.delenv("CF_DEBUG", raising=False)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3), ("text", 0), (True, 0)])
def test_program_result_is_the_exit_code(result: object, code: int) -> None:
    assert exit_code(lambda: result) == code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            UnknownNameError("slug", "tinny", ["tiny"]),
            2,
            "error: unknown slug 'tinny': did you mean 'tiny'? valid: tiny",
        ),
        (CausalForcingError("two\nlines"), 1, "error: two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (typer.Exit(4), 4, ""),
        (BrokenPipeError(), 1, ""),
        (MemoryError(), 3, "error: out of memory (MemoryError): free some, or ask for a smaller video"),
        (KeyError("x"), 1, "error: unexpected KeyError: 'x' (run again with --debug for the traceback)"),
        (ValueError(), 1, "error: unexpected ValueError: no message (run again with --debug for the traceback)"),
    ],
)
def test_program_error_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("causal_forcing.runtime.console._silence_stdout", lambda: None)
    assert exit_code(raising(error)) == code
    assert capsys.readouterr() == ("", line + "\n" * bool(line))


def test_program_environment_fault_leaves_with_3(capsys: Capture) -> None:
    error = EngineMismatchError("sm", got="sm_90", expected="sm_89", fix="cf-build tiny")
    assert exit_code(raising(error)) == 3
    assert "rebuild it: cf-build tiny" in capsys.readouterr().err


def test_program_torch_out_of_memory_is_an_environment_fault(capsys: Capture) -> None:
    class OutOfMemoryError(RuntimeError):  # torch's has this name
        pass

    assert exit_code(raising(OutOfMemoryError("CUDA: tried\nto allocate"))) == 3
    assert capsys.readouterr().err.startswith("error: out of memory (CUDA: tried to allocate)")


@pytest.mark.parametrize("switch", ["argv", "environment"])
def test_program_debugging_shows_the_traceback(switch: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch == "argv":
        monkeypatch.setattr(sys, "argv", ["cf-test", "--debug"])
    else:
        monkeypatch.setenv("CF_DEBUG", "1")
    assert exit_code(raising(KeyError("x"))) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("error: unexpected KeyError: 'x'\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bild"], "Did you mean 'build'?"),
        (["build", "--sed", "3"], "--seed"),
        (["build", "tiny"], "Missing option '--precision'. Choose from: bf16, fp8"),
        (["build", "tiny", "--precision", "fp4"], "'fp4' is not one of 'bf16', 'fp8'"),
        (["build", "bad", "--precision", "fp8"], "no such slug"),
    ],
)
def test_usage_error_is_one_line_with_its_hint(
    arguments: list[str], said: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_app(*arguments, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith(" (see --help)\n")
    assert err.count("\n") == 1
    assert said in err


def test_typer_interrupt_help_and_result_keep_their_codes(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_app("build", "ctrl-c", "--precision", "fp8", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_app("plan", monkeypatch=monkeypatch) == 3
    assert run_app("--help", monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run_app(monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "Usage" in out + err
    assert "error:" not in out + err


def test_program_reader_gone_ends_quietly() -> None:
    script = (
        "import sys\n"
        "from causal_forcing.runtime.console import run_program\n"
        "run_program(lambda: (sys.stdin.read(), print('result'))[1])"
    )
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # else nothing is left to complain of at shutdown
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=buffered) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()  # only now does the program print
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_console_import_is_light() -> None:
    script = "import sys, causal_forcing.runtime.console\nprint({'rich', 'torch', 'numpy', 'typer'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


def test_narration_goes_to_stderr_and_results_to_stdout(capsys: Capture) -> None:
    narrate("loading")
    warn("slow")
    print_json({"a": 1})
    print_table(["x"], [["1"]])
    out, err = capsys.readouterr()
    assert err == "loading\nwarning: slow\n"
    assert out == '{\n  "a": 1\n}\nx\n1\n'


def test_json_of_dataclass_path_enum_and_unicode_reads_back(capsys: Capture) -> None:
    @dataclass(frozen=True, slots=True)
    class Record:
        path: Path
        precision: enum.Enum

    print_json({"record": Record(Path("a/b"), enum.Enum("E", {"A": "bf16"}).A), "prompt": "海"})  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    assert json.loads(out) == {"record": {"path": "a/b", "precision": "bf16"}, "prompt": "海"}
    with pytest.raises(TypeError, match="object has no JSON form"):
        print_json({"x": object()})


def test_table_without_terminal_is_plain_and_aligned(capsys: Capture) -> None:
    print_table(["name", "size"], [["dit_step", 12], ["vae", None]])
    assert capsys.readouterr().out == "name      size\ndit_step  12\nvae\n"


def test_table_on_a_terminal_is_drawn_and_brackets_are_kept() -> None:
    script = "from causal_forcing.runtime.console import print_table\nprint_table(['[h]'], [['[red]x']])"
    reader, writer = pty.openpty()
    subprocess.run([sys.executable, "-c", script], stdout=writer, check=True, env={**os.environ, "TERM": "xterm"})
    os.close(writer)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert "[h]" in shown
    assert "[red]x" in shown
    assert "┃" in shown
