"""Prompts and images that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

Refuses = Callable[..., str]
Run = Callable[..., CompletedProcess[str]]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the prompt is empty; describe the video, for example --prompt"),
        (" \n\t ", "the prompt is empty"),
        ("missing.txt", "prompt file 'missing.txt' does not exist; pass an existing text file, or the prompt itself"),
        ("utf16.txt", "prompt file 'utf16.txt' is not UTF-8 text (byte 0 is 0xff); save it as UTF-8"),
        ("blank.txt", "prompt file 'blank.txt' is empty"),
        ("./", "prompt file './' is a folder"),
    ],
)
def test_prompt_unfit_is_refused(refuses: Refuses, tmp_path: Path, prompt: str, said: str) -> None:
    (tmp_path / "utf16.txt").write_bytes("ein Fuchs".encode("utf-16"))
    (tmp_path / "blank.txt").write_text("\n \n")
    assert said in refuses("cf-generate", "tiny", "--prompt", prompt)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["star"], "; a prompt of one word goes with --prompt"),
        (["tinny"], "; a prompt of one word goes with --prompt"),
        ([""], "the prompt is empty; describe the video, for example --prompt"),
        ([" \t"], "the prompt is empty"),
        (["tiny", ""], "the prompt is empty"),
        (["tiny", "missing.txt"], "prompt file 'missing.txt' does not exist"),
        (["tiny", "a red star", "--prompt", "a fox"], "PROMPT excludes --prompt: give one or the other"),
        (["a red star", "--prompt", "a fox"], "PROMPT excludes --prompt: give one or the other"),
        (["a red star", "--prompt", ""], "PROMPT excludes --prompt: give one or the other"),
        (["a red star", "--from-record", "a.json"], "--from-record repeats a clip as it was: leave out PROMPT"),
        (["tiny", "a red star", "--from-record", "a.json"], "a clip as it was: leave out SLUG, PROMPT"),
    ],
)
def test_prompt_without_its_option_unfit_is_refused(refuses: Refuses, arguments: list[str], said: str) -> None:
    assert said in refuses("cf-generate", *arguments)


def test_prompt_too_long_is_cut_with_a_warning_and_the_clip_is_made(
    run: Run, tiny_engine: Path, tmp_path: Path
) -> None:
    prompt = "fox " * 127 + "and " + "then some words that nobody will read " * 20
    ask = ("--prompt", prompt, "--total-blocks", "1", "--output", "a.mp4")
    finished = run("cf-generate", "tiny", *SIZE, *ask, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    (warning,) = (line for line in finished.stderr.splitlines() if line.startswith("warning: "))
    assert "longer than 512 tokens; cut: 'then some words" in warning
    assert len(warning) < 400
    assert (tmp_path / "a.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("", "--image-path is empty: name one picture file"),
        ("missing.png", "image missing.png does not exist: check --image-path"),
        ("text.png", "text.png is not an image that can be read: expected PNG, JPEG"),
        ("cut.png", "image cut.png is truncated or damaged"),
        ("huge.png", "expected at most 100 megapixels: scale it down first"),
        (".", "image . is a folder: name one picture file"),
        ("http://127.0.0.1:9/x.png", "cannot download image http://127.0.0.1:9/x.png: Connection refused"),
        ("ftp://127.0.0.1/x.png", "ftp:// is not supported"),
    ],
)
def test_image_unfit_is_refused(refuses: Refuses, tmp_path: Path, image: str, said: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    assert said in refuses("cf-generate", "tiny-i2v", *SIZE, "--prompt", "a fox", "--image-path", image)


def test_image_for_text_to_video_and_none_for_image_to_video_are_refused(refuses: Refuses, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    got = refuses("cf-generate", "tiny", "--prompt", "a fox", "--image-path", "a.png")
    assert "tiny makes video from text alone: leave out --image-path, or use an i2v slug" in got
    got = refuses("cf-generate", "tiny-i2v", "--prompt", "a fox")
    assert "tiny-i2v starts from an image and none was given: add --image-path FILE" in got


def test_image_and_prompt_are_refused_in_a_process_of_their_own_too(refuses: Refuses) -> None:
    refuses("cf-generate", "tiny", "--prompt", "missing.txt", alone=True)
    refuses("cf-generate", "tiny-i2v", "--prompt", "a fox", "--image-path", "missing.png", alone=True)
