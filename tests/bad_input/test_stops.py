"""Ctrl-C, SIGTERM, kill -9, and two programs at the same thing: what is on disk stays whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]
Refuses = Callable[..., str]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")
ENDLESS = ("tiny", *SIZE, "--prompt", "a fox", "--device", "cpu", "--endless", "--output", "a.mp4")
LIMIT_S = 120


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@contextlib.contextmanager
def running(
    program: str, *arguments: str, cwd: Path, until: Callable[[], object], **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a program that writes to the files `stdout` and `stderr`, wait until something is so; killed at the end."""
    command = [str(Path(sys.executable).parent / program), *arguments]
    with (cwd / "stdout").open("w") as stdout, (cwd / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=stdout, stderr=stderr, text=True, env=os.environ | environment
        )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not until():
            assert process.poll() is None, (cwd / "stderr").read_text()
            assert time.monotonic() < deadline, (cwd / "stderr").read_text()
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def record_of(folder: Path) -> dict[str, Any]:
    path = folder / "a.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"blocks": 0}
    return content


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted"),
        (signal.SIGHUP, 129, "interrupted"),
        (signal.SIGKILL, -9, "running"),
    ],
)
def test_generation_stopped_keeps_a_playable_clip_and_a_true_record(
    run: Run, tiny_engine: Path, tmp_path: Path, number: signal.Signals, code: int, status: str
) -> None:
    with running("cf-generate", *ENDLESS, cwd=tmp_path, until=lambda: record_of(tmp_path)["blocks"] >= 3) as process:
        process.send_signal(number)
        assert process.wait(LIMIT_S) == code
    said, record = (tmp_path / "stderr").read_text(), record_of(tmp_path)
    assert (tmp_path / "stdout").read_text() == ""
    assert "Traceback" not in said
    assert record["status"] == status
    assert record["frames"] == 12 * record["blocks"] - 3
    frames = frames_in(tmp_path / "a.mp4")
    if number == signal.SIGKILL:
        assert record["frames"] - 1 <= frames <= record["frames"] + 12
    else:
        assert frames == record["frames"]
        assert said.endswith(f"kept the clip so far: {frames} frames in a.mp4\ninterrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.mp4", "stdout", "stderr"}
    if number in (signal.SIGINT, signal.SIGKILL):
        again = run("cf-generate", "--from-record", "a.json", "--output", "b.mp4", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert f"repeated bit for bit: {record['frames']} frames" in again.stderr
        assert frames_in(tmp_path / "b.mp4") == record["frames"]


def test_builds_in_each_others_way_stopped_and_killed_then_built(
    run: Run, refuses: Refuses, tiny_i2v_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One story, since each build costs seconds: a damaged engine in the cache is replaced after many attempts."""
    engine = tmp_path / "home" / "engines" / "tiny-i2v" / tiny_i2v_engine.name
    shutil.copytree(tiny_i2v_engine, engine)
    (engine / "vae_decoder.pt2").write_bytes(b"damaged")
    home = {"CAUSAL_FORCING_HOME": str(tmp_path / "home")}
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    options = ("tiny-i2v", *SIZE, "--backend", "torch", "--device", "cpu")
    clip = ("--prompt", "a fox", "--image-path", "a.png", "--total-blocks", "2", "--output", "a.mp4")

    def has_begun() -> bool:
        return "[1/9]" in (tmp_path / "stderr").read_text()

    def partials() -> list[Path]:
        return list(engine.parent.glob(".*.partial-*"))

    with running("cf-build", *options, cwd=tmp_path, until=has_begun, **home) as first:
        assert "warning: building again: " in (tmp_path / "stderr").read_text()
        assert len(partials()) == 1
        first.send_signal(signal.SIGSTOP)  # keeps its lock
        # It runs `cf-build`, whose line it must not repeat in its own words.
        second = run("cf-generate", *options, *clip, cwd=tmp_path, env=os.environ | home)
        assert second.returncode == 3, second.stderr
        errors = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert f"another process is building {engine}: wait for it, or stop it and run" in errors[0]
        assert second.stderr.endswith(errors[0] + "\n")
        monkeypatch.setenv("CAUSAL_FORCING_HOME", home["CAUSAL_FORCING_HOME"])
        assert "another process is building " in refuses("cf-build", *options, code=3, begun=True)
    assert len(partials()) == 1, "a killed build leaves its hidden folder"
    assert (engine / "vae_decoder.pt2").read_bytes() == b"damaged"

    with running("cf-generate", *options, *clip, cwd=tmp_path, until=has_begun, **home) as stopped:
        assert len(partials()) == 1, "of the new build; that of the killed one is gone"
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(LIMIT_S) == 130
    said = (tmp_path / "stderr").read_text()
    assert said.endswith("stopping the build\ninterrupted\ninterrupted\n")
    assert "Traceback" not in said
    assert not partials()
    assert (engine / "vae_decoder.pt2").read_bytes() == b"damaged"
    assert not (tmp_path / "a.mp4").exists()

    made = run("cf-generate", *options, *clip, cwd=tmp_path, env=os.environ | home)
    assert made.returncode == 0, made.stderr
    assert f"warning: building again: {engine / 'vae_decoder.pt2'} is damaged: 7 bytes" in made.stderr
    assert made.stdout == "a.mp4\n"
    assert frames_in(tmp_path / "a.mp4") == 5
    assert not partials()
