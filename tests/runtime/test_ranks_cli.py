"""Several processes at one clip, as a user starts them: torchrun or `--context-parallel`, faults, stops, messages."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from causal_forcing.runtime.environment import EXCHANGE_VARIABLE

Run = Callable[..., subprocess.CompletedProcess[str]]
Refuses = Callable[..., str]
PROGRAMS = Path(sys.executable).parent
SIZE = ("--pixel-height", "32", "--pixel-width", "32", "--backend", "torch", "--precision", "fp32", "--device", "cpu")
ASK = ("tiny", *SIZE, "--prompt", "a fox")
ENDLESS = (*ASK, "--endless", "--output", "a.mp4", "--context-parallel", "2")
ALL_END_S = 30
LIMIT_S = 120

# On rank 1 the third chunk runs out of memory, as torch says it.
FAULTY = """
import sys
from causal_forcing.runtime import clip, cli
def fail(chunks, request):
    next(chunks), next(chunks)
    raise MemoryError("no room for the third chunk")
clip._follow_clip = fail
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def engines(run: Run) -> None:
    """Build before the clock of any test runs."""
    built = run("cf-build", "tiny", *SIZE, "--context-parallel", "2")
    assert built.returncode == 0, built.stderr


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def record_of(folder: Path) -> dict[str, Any]:
    path = folder / "a.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"blocks": 0}
    return content


@contextlib.contextmanager
def endless(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start an endless clip of two ranks, and wait until it has three chunks; gives launcher and the ranks' pids."""
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [PROGRAMS / "cf-generate", *ENDLESS], cwd=folder, stdout=stdout, stderr=stderr, text=True
        )
    try:
        deadline = time.monotonic() + LIMIT_S
        while record_of(folder)["blocks"] < 3:
            assert process.poll() is None, (folder / "stderr").read_text()
            assert time.monotonic() < deadline, (folder / "stderr").read_text()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield process, [int(child) for child in children]
    finally:
        process.terminate()
        process.wait(ALL_END_S)


def lines_of(folder: Path) -> list[str]:
    """Return what was said but for the progress and the hint at random weights."""
    lines = (folder / "stderr").read_text().splitlines()
    return [line for line in lines if not line.startswith(("chunk ", "tiny has random weights"))]


def ranks_of(folder: Path, program: list[str], words: list[list[str]], **variables: str) -> list[tuple[int, str, str]]:
    """Start ranks by hand, each with words of its own; returns exit code, stdout and stderr of each."""
    environment = os.environ | {"WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1"} | variables
    ranks = [
        subprocess.Popen(
            [*program, *own],
            cwd=folder,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(words)
    ]
    outputs = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def test_torchrun_makes_one_clip_and_its_record_repeats_without_it(run: Run, tmp_path: Path) -> None:
    program = str(PROGRAMS / "cf-generate")
    made = run("torchrun", "--nproc_per_node=2", "--no-python", program, *ASK, "--total-blocks", "2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "outputs/tiny.mp4\n"
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["tiny.json", "tiny.mp4"]
    assert "Warning" not in made.stderr
    assert made.stderr.count("chunk 2/2") == 1
    again = run("cf-generate", "--from-record", "outputs/tiny.json", "--output", "b.mp4", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert (record["ranks"], record["device"], record["frames"]) == (2, "cpu", frames_in(tmp_path / "b.mp4"))
    assert "repeated bit for bit" in again.stderr


def test_ctrl_c_ends_all_ranks_and_keeps_the_clip(tmp_path: Path) -> None:
    with endless(tmp_path) as (process, ranks):
        assert len(ranks) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(ALL_END_S) == 130
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    record = record_of(tmp_path)
    assert (record["status"], record["frames"]) == ("interrupted", frames_in(tmp_path / "a.mp4"))
    assert lines_of(tmp_path) == [f"kept the clip so far: {record['frames']} frames in a.mp4", "interrupted"]
    assert (tmp_path / "stdout").read_text() == ""


def test_rank_killed_ends_all_and_keeps_the_clip(tmp_path: Path) -> None:
    with endless(tmp_path) as (process, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(ALL_END_S) == 128 + signal.SIGKILL
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    record = record_of(tmp_path)
    assert (record["status"], record["frames"]) == ("failed", frames_in(tmp_path / "a.mp4"))
    kept, said = lines_of(tmp_path)
    assert kept.startswith("kept the clip so far")
    assert said.startswith("error: rank 1 ended without a word")


def test_rank_out_of_memory_says_so_and_ends_all(tmp_path: Path) -> None:
    words = [*ASK, "--total-blocks", "9", "--output", "a.mp4"]
    ranks = ranks_of(tmp_path, [sys.executable, "-c", FAULTY], [words, words], MASTER_PORT=free_port())
    assert [code for code, _, _ in ranks] == [3, 3]
    (_, _, first), (_, _, second) = ranks
    assert second.startswith("error: rank 1: out of memory (no room for the third chunk)")
    assert "error" not in first
    assert record_of(tmp_path)["status"] == "failed"
    assert record_of(tmp_path)["frames"] == frames_in(tmp_path / "a.mp4")


def test_ranks_that_were_asked_for_different_clips_refuse(tmp_path: Path) -> None:
    words = [[*ASK, "--seed", seed] for seed in ("1", "2")]
    (code, _, said), (other, _, silent) = ranks_of(
        tmp_path, [str(PROGRAMS / "cf-generate")], words, MASTER_PORT=free_port()
    )
    assert (code, other, silent) == (2, 2, "")
    assert said == (
        "error: the ranks were asked for different clips: --seed is 1 on rank 0 and 2 on rank 1: give all of them the "
        "same\n"
    )
    assert not (tmp_path / "outputs").exists()


def test_port_in_use_is_refused_in_a_line(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = str(listening.getsockname()[1])
        environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": port}
        command = [str(PROGRAMS / "cf-generate"), *ASK]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 3
    assert ended.stderr.startswith(f"error: rank 0 cannot listen on port {port} of 127.0.0.1, is it in use?")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--context-parallel", "3"], "3 GPUs cannot share the 2 attention heads of tiny: use 1, 2"),
        (["--context-parallel", "2", "--device", "cuda:1"], "--device cuda:1 is one GPU, and each rank takes its own"),
    ],
)
def test_what_no_ranks_can_do_is_refused_before_any_starts(refuses: Refuses, words: list[str], said: str) -> None:
    assert said in refuses("cf-generate", *ASK[:-2], *words)


def test_exchange_that_there_is_none_of_is_refused_before_any_starts(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXCHANGE_VARIABLE, "pigeons")
    said = refuses("cf-generate", *ASK, "--context-parallel", "2")
    assert "CAUSAL_FORCING_EXCHANGE is 'pigeons', expected collectives or stores: unset it for the first" in said


def test_context_parallel_beside_another_torchrun_is_refused(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    said = refuses("cf-generate", *ASK, "--context-parallel", "2")
    assert "--context-parallel is 2, torchrun started 4 processes: give both the same number" in said
