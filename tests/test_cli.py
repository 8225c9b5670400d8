"""Both programs as a user runs them: what goes to which stream, `--json`, closed pipes, and cf-build's other verbs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.build_engines.cli import main
from causal_forcing.runtime.cli import main as generate
from causal_forcing.runtime.variant import VARIANTS

Run = Callable[..., subprocess.CompletedProcess[str]]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")
ASK = ("--prompt", "a fox", "--total-blocks", "2", "--output", "a.mp4")


def answer(finished: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    """Return the JSON that is all of a program's stdout."""
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return json.loads(finished.stdout)


def test_generate_prints_the_clip_alone_on_stdout_and_no_colour(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    finished = run("cf-generate", "tiny", *SIZE, *ASK, cwd=tmp_path, env=os.environ | {"FORCE_COLOR": "1"})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "a.mp4\n"
    assert "chunk 2/2, 21 frames" in finished.stderr
    assert "\x1b" not in finished.stdout + finished.stderr
    assert "\r" not in finished.stderr


def test_generate_json_is_the_record(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    summary = answer(run("cf-generate", "--engine", str(tiny_engine), *ASK, "--json", cwd=tmp_path))
    assert summary == json.loads((tmp_path / "a.json").read_text())
    assert summary["engine_config"]["variant"]["slug"] == "tiny", "of the engine, where no slug is given"


def test_generate_a_known_prompt_needs_no_text_encoder(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    home = os.environ | {"CAUSAL_FORCING_HOME": str(tmp_path / "home")}
    ask = ("cf-generate", "--engine", str(engine), *ASK, "--json")
    encoded = answer(run(*ask, "--no-prompt-cache", "--text-encoder", "keep", cwd=tmp_path, env=home))
    assert encoded["prompt_source"] == "encoded"
    assert not (tmp_path / "home").exists()
    assert answer(run(*ask, cwd=tmp_path, env=home))["prompt_source"] == "encoded"
    (engine / "text_encoder.onnx").write_bytes(b"damaged")
    cached = answer(run(*ask, cwd=tmp_path, env=home))
    assert cached["prompt_source"] == "cached"
    assert cached["frames_sha256"] == encoded["frames_sha256"]
    refused = run(*ask, "--no-prompt-cache", cwd=tmp_path, env=home)
    assert refused.returncode == 3
    assert "text_encoder.onnx is damaged: 7 bytes" in refused.stderr
    assert run("cf-generate", "--from-record", "a.json", "--no-prompt-cache", cwd=tmp_path, env=home).returncode == 3


def test_generate_with_a_cache_folder_that_cannot_be_written_warns(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    home = os.environ | {"CAUSAL_FORCING_HOME": str(tmp_path / "home")}
    finished = run("cf-generate", "--engine", str(tiny_engine), *ASK, cwd=tmp_path, env=home)
    assert finished.returncode == 0, finished.stderr
    assert "warning: the prompt's embedding is not kept in " in finished.stderr


def test_generate_without_output_takes_a_new_name_each_time(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    for name in ("tiny.mp4", "tiny-2.mp4"):
        finished = run("cf-generate", "tiny", *SIZE, "--total-blocks", "1", "--output-dir", "a/b", cwd=tmp_path)
        assert finished.stdout == f"a/b/{name}\n", finished.stderr
        assert finished.stderr.startswith("the default prompt: A paper boat")


def test_generate_list_and_no_instantiate_print_json(run: Run) -> None:
    assert list(answer(run("cf-generate", "--list", "--json"))) == list(VARIANTS)
    resolved = answer(run("cf-generate", "tiny", *SIZE, "--prompt", "a fox", "--seed", "3", "--no-instantiate"))
    assert resolved["geometry"]["pixel_height"] == 32
    assert resolved["generate"]["seed"] == 3
    assert resolved["variant"]["slug"] == "tiny"


@pytest.mark.parametrize(
    ("words", "slug", "prompt"),
    [
        (["a red star drifts left"], "shapes", "a red star drifts left"),
        (["--seed", "3", "a red star"], "shapes", "a red star"),
        (["tiny", "a red star"], "tiny", "a red star"),
        (["tiny", "star"], "tiny", "star"),
        (["--prompt", "star"], "shapes", "star"),
        (["tiny", "--prompt", "a red star"], "tiny", "a red star"),
        (["a prompt.txt"], "shapes", "from a file"),
        (["--seed", "3"], "shapes", VARIANTS["shapes"].default_prompt),
        (["tiny"], "tiny", VARIANTS["tiny"].default_prompt),
    ],
)
def test_generate_prompt_stands_alone_after_the_slug_or_in_its_option(
    words: list[str],
    slug: str,
    prompt: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a prompt.txt").write_text("from a file\n")
    with pytest.raises(SystemExit) as left:
        generate([*words, "--no-instantiate"])
    resolved = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    assert (resolved["engine"]["slug"], resolved["variant"]["slug"], resolved["generate"]["prompt"]) == (
        slug,
        slug,
        prompt,
    )


def test_generate_lone_prompt_leaves_the_slug_to_the_engine(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        generate(["--engine", str(tiny_engine), "a red star", "--no-instantiate"])
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["variant"]["slug"], resolved["generate"]["prompt"]) == ("tiny", "a red star")


def test_build_json_says_what_was_reused(run: Run, tiny_engine: Path) -> None:
    summary = answer(run("cf-build", "tiny", *SIZE, "--json"))
    assert summary["engine"] == str(tiny_engine)
    assert summary["reused"] is True


def test_build_plan_json_tells_reuse_from_build(
    run: Run, tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = answer(run("cf-build", "plan", "tiny", *SIZE, "--json"))
    assert (here["reuse"], here["folder"]) == (True, str(tiny_engine))
    with pytest.raises(SystemExit):
        main(["plan", "tiny", *SIZE, "--window-frames", "9", "--json"])
    other = json.loads(capsys.readouterr().out)
    assert other["reuse"] is False
    assert "window_frames (21, wanted 9)" in other["reason"]
    assert not Path(other["folder"]).exists()


def test_build_plan_survives_damaged_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, content in enumerate(("", "[]", '{"config": 3}', "{}")):
        folder = tmp_path / "engines" / "tiny" / str(number)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(content)
    with pytest.raises(SystemExit):
        main(["plan", "tiny", *SIZE, "--output", str(tmp_path / "engines"), "--json"])
    assert json.loads(capsys.readouterr().out)["reason"] == "no engine of tiny has been built"


def test_build_inspect_and_verify_print_json(run: Run, tiny_engine: Path) -> None:
    inspected = answer(run("cf-build", "inspect", str(tiny_engine), "--json"))
    assert inspected["config"]["slug"] == "tiny"
    assert {network["network"] for network in inspected["networks"]} >= {"dit_step", "vae_decoder"}
    verified = answer(run("cf-build", "verify", "tiny", *SIZE, "--json"))
    assert all(comparison["passed"] for comparison in verified)


def test_build_doctor_prints_json_whatever_the_cache_folder_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = answer(
        run("cf-build", "doctor", "--json", env=os.environ | {"CAUSAL_FORCING_HOME": str(tmp_path / "file")})
    )
    assert report["usable"] is True
    (disk,) = (probe for probe in report["probes"] if probe["name"] == "disk")
    assert disk["status"] == "fail"
    assert disk["detail"] == f"{tmp_path / 'file'} is a file, expected a folder"


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| head -c0", 1, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 3, "error: cannot write the result to stdout: No space left on device; send it elsewhere\n"),
    ],
)
@pytest.mark.parametrize("command", ["cf-generate --list", "cf-generate --list --json", "cf-build doctor"])
def test_stdout_that_takes_nothing_ends_quietly(
    run: Run, tmp_path: Path, command: str, redirection: str, code: int, said: str
) -> None:
    shell = f"set -o pipefail; {Path(sys.executable).parent}/{command} {redirection}"
    finished = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.stderr == said
    # `head` may have read before it closed the pipe.
    assert finished.returncode in ((0, 1) if "head" in redirection else (code,))


def test_stdout_closed_early_keeps_the_clip_and_its_record(run: Run, tiny_engine: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "cf-generate"
    command = [str(program), "tiny", *SIZE, *ASK]
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert finished.returncode == 1
    assert "error" not in finished.stderr
    assert json.loads((tmp_path / "a.json").read_text())["status"] == "complete"


def test_version_is_printed_by_both_programs(run: Run) -> None:
    assert run("cf-generate", "--version").stdout == run("cf-build", "--version").stdout != ""


@pytest.mark.parametrize("program", ["cf-generate", "cf-build"])
def test_program_without_arguments_shows_its_help(run: Run, program: str) -> None:
    finished = run(program)
    assert finished.returncode == 2
    assert "Usage: " in finished.stdout + finished.stderr
    assert "error:" not in finished.stdout + finished.stderr
