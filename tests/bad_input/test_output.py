"""Outputs that cannot be written, from the start or on the way; what is there already is never lost."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import av
import pytest

Refuses = Callable[..., str]
Run = Callable[..., CompletedProcess[str]]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")
ASK = ("tiny", *SIZE, "--prompt", "a fox", "--device", "cpu")


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize(
    ("output", "said", "code"),
    [
        ("missing/a.mp4", "cannot write missing/a.mp4: its folder is missing: mkdir -p missing", 3),
        ("folder.mp4", "cannot write folder.mp4: it is a folder; name a file: folder.mp4/clip.mp4", 3),
        ("file/a.mp4", "file is a file, expected a folder", 3),
        ("frames", "frames holds frames of an earlier clip: name another folder, or remove them", 3),
        ("a.webm", "cannot write .webm files: got a.webm, expected NAME.mp4 for a video or a folder for PNG frames", 2),
        ("", "--output is empty: name an .mp4 file, or a folder for PNG frames", 2),
        ("/", "cannot write the record of /: it has no folder to lie in", 3),
        ("notes.mp4", "cannot write the record notes.json: the file there is no clip record and would be lost", 3),
        ("taken.mp4", "cannot write the record taken.json: it is a folder", 3),
    ],
)
def test_output_unfit_is_refused_and_what_is_there_stays(
    refuses: Refuses, tmp_path: Path, output: str, said: str, code: int
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "frame_00000.png").touch()
    (tmp_path / "notes.json").write_text('{"mine": true}')
    (tmp_path / "taken.json").mkdir()
    assert said in refuses("cf-generate", *ASK, "--output", output, code=code)


def test_output_on_a_read_only_file_system_is_refused(refuses: Refuses) -> None:
    read_only = next((path for path in ("/sys/kernel", "/proc/sys") if not os.access(path, os.W_OK)), None)
    if read_only is None:
        pytest.skip("no read-only file system is mounted here")
    said = refuses("cf-generate", *ASK, "--output", f"{read_only}/a.mp4", code=3)
    assert f"cannot write {read_only}/a.mp4: Permission denied; name an output that you may write" in said


@pytest.mark.parametrize("folder", ["file", "file/deeper"])
def test_output_folder_that_cannot_be_made_is_refused(refuses: Refuses, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    said = refuses("cf-generate", *ASK, "--output-dir", folder, code=3)
    assert f"cannot write into {folder}: {tmp_path / 'file'} is no folder; choose another --output-dir" in said


def test_output_disk_full_on_the_way_keeps_a_playable_clip(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))

    finished = run("cf-generate", *ASK, "--total-blocks", "9", "--output", "a.mp4", cwd=tmp_path, preexec_fn=limit)
    assert finished.returncode == 3, finished.stderr
    last = finished.stderr.splitlines()[-1]
    frames = frames_in(tmp_path / "a.mp4")
    assert last.startswith(f"error: cannot write a.mp4: File too large; the first {frames} frames are safe in it; ")
    assert "Traceback" not in finished.stderr
    assert frames > 9
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["status"] == "failed"
    assert record["frames"] <= frames + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]


def test_output_disk_full_at_once_leaves_nothing(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    finished = run("cf-generate", *ASK, "--total-blocks", "1", cwd=tmp_path, preexec_fn=limit)
    assert finished.returncode == 3, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write outputs/tiny.mp4: File too large; ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
