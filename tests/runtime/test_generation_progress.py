"""What is shown of a clip while it is made, and the rates."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from causal_forcing.runtime.generation_progress import GenerationProgress

Capture = pytest.CaptureFixture[str]


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_progress_rates_leave_the_first_chunk_out(capsys: Capture) -> None:
    clock = Clock()
    with GenerationProgress(4, clock=clock) as progress:
        assert (progress.first_frame_s, progress.fps, progress.eta_s) == (None, None, None)
        clock.now_s += 5
        progress.advance(9)
        assert (progress.first_frame_s, progress.fps) == (5.0, None)
        for _ in range(2):
            clock.now_s += 0.5
            progress.advance(12)
        assert progress.fps == 24.0
        assert progress.eta_s == 0.5
        assert progress.frames == 33


def test_progress_without_terminal_prints_a_line_every_two_seconds(capsys: Capture) -> None:
    clock = Clock()
    with GenerationProgress(None, clock=clock) as progress:
        for _ in range(11):
            clock.now_s += 0.5
            progress.advance(12)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "chunk 1",
        "chunk 5",
        "chunk 9",
        "chunk 11",
    ]


def test_progress_that_just_printed_its_last_chunk_does_not_repeat_it(capsys: Capture) -> None:
    with GenerationProgress(1, clock=Clock()) as progress:
        progress.advance(9)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "chunk 1/1, 9 frames, first frame 0.00 s\n"


@pytest.mark.parametrize("total", ["3", "None"])
def test_progress_on_a_terminal_is_one_live_line(total: str) -> None:
    script = (
        "from causal_forcing.runtime.generation_progress import GenerationProgress\n"
        f"with GenerationProgress({total}) as progress:\n"
        "    for _ in range(3): progress.advance(12)\n"
        "    print('result')\n"
    )
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, check=True, env=environment)
    os.close(writer)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert f"chunk 3{'/3' if total == '3' else ''}, 36 frames" in shown
    assert shown.count("\n") == 1
    assert result.stdout == b"result\n"
