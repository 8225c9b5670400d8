"""Engine directories that are damaged, altered, or made for something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.runtime.config import fingerprint_of

Refuses = Callable[..., str]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")
ASK = ("--prompt", "a fox", "--total-blocks", "1", "--output", "a.mp4", "--device", "cpu", "--no-prompt-cache")
REBUILD = "rebuild it: cf-build tiny --pixel-height 32 --pixel-width 48 --backend onnxruntime --precision fp32"


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """A copy of the tiny engine to spoil, where `cf-build tiny --output engines` would put it."""
    return Path(shutil.copytree(tiny_engine, tmp_path / "engines" / "tiny" / tiny_engine.name))


def edit(engine: Path, change: Callable[[dict[str, Any]], object], *, is_signed: bool = False) -> None:
    """Change a manifest; signed, its own hashes are made right again, as a build of another version would."""
    path = engine / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if is_signed:
        content.pop("digest")
        content["fingerprint"] = fingerprint_of(content["config"])
        content["digest"] = fingerprint_of(content)
    path.write_text(json.dumps(content))


def flip(engine: Path) -> None:
    path = engine / "dit_step.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flip, "dit_step.onnx is damaged: "),
        (lambda engine: (engine / "vae_decoder.onnx").unlink(), "vae_decoder.onnx is missing"),
        (lambda engine: (engine / "text_encoder.onnx").write_bytes(b""), "text_encoder.onnx is damaged: 0 bytes"),
        (lambda engine: (engine / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda engine: edit(engine, lambda c: c["config"].update(precision="bf16")), "manifest.json was altered"),
        (lambda engine: edit(engine, lambda c: c["artefacts"].clear()), "manifest.json was altered"),
        (lambda engine: edit(engine, lambda c: c["networks"][0].update(name="x")), "manifest.json was altered"),
        (lambda engine: edit(engine, lambda c: c.pop("networks")), "manifest.json was altered"),
        (
            lambda engine: edit(engine, lambda c: c["config"]["geometry"].update(pixel_height=33), is_signed=True),
            "manifest.json lacks or misnames a field",
        ),
    ],
)
def test_engine_damaged_is_refused_with_the_command_that_rebuilds_it(
    refuses: Refuses, engine: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(engine)
    got = refuses("cf-generate", "tiny", *ASK, "--engine", str(engine), code=3)
    assert said in got
    assert "rebuild it: cf-build tiny " in got
    assert got.endswith(f" --output {tmp_path / 'engines'}"), "the command rebuilds this one, not the cached one"
    assert said in refuses("cf-build", "inspect", str(engine), code=3)


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[]", '{"config": 3}', '{"config": [], "schema_version": 2}', "\0\xff"]
)
def test_engine_manifest_that_is_none_is_refused(refuses: Refuses, engine: Path, content: str) -> None:
    (engine / "manifest.json").write_text(content, encoding="latin-1")
    for program, *arguments in (("cf-build", "inspect", str(engine)), ("cf-generate", *ASK, "--engine", str(engine))):
        got = refuses(program, *arguments, code=3)
        assert "manifest.json " in got
        assert "rebuild it: cf-build " in got


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("schema_version", 1, "schema_version is 1, expected 2"),
        ("package_version", "0.0.1", "package_version is 0.0.1, expected "),
        ("op_digest", "0" * 16, f"op_digest is {'0' * 16}, expected "),
    ],
)
def test_engine_of_another_version_names_both(
    refuses: Refuses, engine: Path, field: str, value: object, said: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["config"][field] = value
        if field == "schema_version":
            content[field] = value

    edit(engine, change, is_signed=True)
    got = refuses("cf-generate", "tiny", *ASK, "--engine", str(engine), code=3)
    assert f"the engine does not fit: {said}" in got
    assert REBUILD in got


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["tiny", "--pixel-height", "64"], "pixel_height is 32, expected 64; rebuild it: cf-build tiny --pixel-hei", 3),
        (["tiny", "--precision", "bf16"], "precision is fp32, expected bf16", 3),
        (["tiny", "--backend", "torch"], "backend is onnxruntime, expected torch", 3),
        (["tiny", "--window-frames", "9"], "window_frames is 21, expected 9", 3),
        (["tiny", "--random-weights", "7"], "weights is random:0, expected random:7", 3),
        (["tiny-i2v"], "slug is tiny, expected tiny-i2v; rebuild it: cf-build tiny-i2v", 3),
        (
            ["tiny", "--decoder", "taehv"],
            "decoder is wan, expected taehv; rebuild it: cf-build tiny --decoder taehv",
            3,
        ),
        (["tiny", "--checkpoint", "x.pt"], "--engine excludes --checkpoint, --wan-folder and --taehv", 2),
    ],
)
def test_engine_of_something_else_names_the_field(
    refuses: Refuses, tiny_engine: Path, arguments: list[str], said: str, code: int
) -> None:
    assert said in refuses("cf-generate", *arguments, *ASK, "--engine", str(tiny_engine), code=code)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("missing", "no engine directory missing: leave out --engine, or run: cf-build tiny"),
        ("file", "no engine directory file"),
        (".", "no engine in .: manifest.json is not there; build one: cf-build SLUG"),
    ],
)
def test_engine_folder_that_is_none_is_refused(refuses: Refuses, tmp_path: Path, folder: str, said: str) -> None:
    (tmp_path / "file").touch()
    assert said in refuses("cf-generate", "tiny", *ASK, "--engine", folder, code=3)
    assert "no engine in " in refuses("cf-build", "inspect", folder, code=3)


def test_engine_not_built_yet_verify_says_how(refuses: Refuses) -> None:
    arguments = ["--window-frames", "9", "--random-weights", "3", "--device", "cpu", "--output", "elsewhere"]
    got = refuses("cf-build", "verify", "tiny", *SIZE, *arguments, code=3)
    assert "build it: cf-build tiny --pixel-height 32 --pixel-width 48 --window-frames 9 " in got
    assert got.endswith("--random-weights 3 --output elsewhere")


@pytest.mark.parametrize("home", ["a file", "/proc/none"])
def test_engine_cache_that_cannot_be_written_says_what_to_set(
    refuses: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("CAUSAL_FORCING_HOME", home)
    got = refuses("cf-build", "tiny", *SIZE, "--device", "cpu", code=3, begun=True)
    assert f"cannot write the engine {home}/engines/tiny/" in got
    assert got.endswith("choose another folder with cf-build --output or CAUSAL_FORCING_HOME")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["tiny", "--quality"],
            "--quality is measured on moving shapes, which tiny does not make: use shapes, s",
        ),
        (
            ["shapes", "--quality", "--pixel-height", "64"],
            "--quality is measured at 128×128, not at 64×128: leave out",
        ),
        (["shapes", "--quality", "--prompts", "0"], "--prompts 0 is out of range: use a number from 1 to 141"),
        (["shapes", "--quality", "--prompts", "142"], "--prompts 142 is out of range"),
        (["shapes", "--prompts", "4"], "--prompts is for --quality: add it, or leave out --prompts"),
    ],
)
def test_quality_that_cannot_be_measured_is_refused(refuses: Refuses, arguments: list[str], said: str) -> None:
    assert said in refuses("cf-build", "verify", *arguments)


def test_quality_of_an_engine_not_built_yet_says_how(refuses: Refuses) -> None:
    got = refuses("cf-build", "verify", "shapes", "--quality", "--random-weights", "9", "--device", "cpu", code=3)
    assert "build it: cf-build shapes " in got
