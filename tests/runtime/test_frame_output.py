"""Outputs that cannot be written: what is said of each before anything is made."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from causal_forcing.runtime.errors import OutputError, UsageError
from causal_forcing.runtime.frame_output import check_writable
from causal_forcing.runtime.frame_sink import open_sink


@pytest.mark.parametrize("choose", [lambda path: open_sink(path, fps=16), check_writable])
def test_output_of_unknown_suffix_lists_what_is_accepted(tmp_path: Path, choose: object) -> None:
    assert callable(choose)
    with pytest.raises(
        UsageError, match=r"cannot write \.avi files: got .*clip\.avi, expected NAME\.mp4 .* or a folder"
    ):
        choose(tmp_path / "clip.avi")


def test_check_writable_missing_parent_says_mkdir(tmp_path: Path) -> None:
    for name in ("clip.mp4", "frames"):
        with pytest.raises(OutputError, match=rf"{name}: its folder is missing: mkdir -p '.*/a b/c'$"):
            check_writable(tmp_path / "a b" / "c" / name)


def test_check_writable_folder_named_mp4_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(OutputError, match="it is a folder; name a file"):
        check_writable(tmp_path / "clip.mp4")


def test_check_writable_file_as_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        check_writable(tmp_path / "file" / "clip.mp4")


def test_check_writable_good_output_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"precious")
    for name in ("clip.mp4", "new.mp4", "frames"):
        check_writable(tmp_path / name)
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_check_writable_refused_open_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "clip.mp4").touch()

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=rf"{os.strerror(code)}; name an output"):
        check_writable(tmp_path / "clip.mp4")


def test_check_writable_unwritable_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    for name in ("clip.mp4", "frames"):
        with pytest.raises(OutputError, match="Permission denied; name an output that you may write"):
            check_writable(tmp_path / name)
