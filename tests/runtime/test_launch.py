"""The launcher of ranks, with ranks that are shell scripts."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from causal_forcing.runtime.launch import environment_without_ranks, run_ranks


def ranks(script: str, number: int = 2, **times: float) -> int:
    return run_ranks(["sh", "-c", script], number, poll_s=0.01, **{"follow_s": 0.3, "end_s": 1.0} | times)


def test_ranks_get_torchruns_variables_and_only_the_first_has_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("echo out $RANK; echo $RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR >&2") == 0
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["0/2 0 127.0.0.1", "1/2 1 127.0.0.1"]


def test_exit_code_is_that_of_the_rank_that_failed_first() -> None:
    assert ranks("[ $RANK = 1 ] && exit 3; sleep 0.2; exit 4") == 3


def test_rank_that_was_killed_is_named_where_no_other_could(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("[ $RANK = 1 ] && kill -9 $$; exec sleep 60") == 128 + 9
    assert capfd.readouterr().err == "error: rank 1 was killed by SIGKILL: is there enough memory? run it again\n"


def test_ranks_that_do_not_end_are_killed() -> None:
    started_s = time.monotonic()
    assert ranks("[ $RANK = 0 ] && exit 5; trap '' TERM; while :; do sleep 0.1; done") == 5
    assert time.monotonic() - started_s < 10


def test_stop_reaches_rank_0_whose_exit_code_counts() -> None:
    script = "[ $RANK = 1 ] && exec sleep 2; trap 'exit 143' TERM; while :; do sleep 0.05; done"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert ranks(script) == 130


def test_programs_that_are_no_ranks_get_none_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OTHER", "1")
    environment = environment_without_ranks()
    assert environment["OTHER"] == "1"
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment)
