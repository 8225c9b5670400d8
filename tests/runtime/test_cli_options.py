"""Command-line options that are made from `EngineOptions`."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from causal_forcing.runtime.cli_options import AsJson, Device, field_help, takes_engine_options
from causal_forcing.runtime.config import EngineConfig, EngineOptions, GenerateConfig
from causal_forcing.runtime.resolution import resolve_engine, weights_identity
from causal_forcing.runtime.spec import Geometry, Variant

received: dict[str, Any] = {}
app = typer.Typer()


@app.command()
@takes_engine_options
def command(options: EngineOptions, device: Device = "auto", as_json: AsJson = False) -> None:
    """Do something with an engine."""
    received.update(options=options, device=device, as_json=as_json)


def parse(*words: str) -> EngineOptions:
    received.clear()
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    options = received["options"]
    assert isinstance(options, EngineOptions)
    return options


@pytest.mark.parametrize("config", [EngineOptions, EngineConfig, GenerateConfig, Geometry, Variant])
def test_field_help_of_a_configuration_class_has_a_sentence_for_every_field(config: type) -> None:
    texts = field_help(config)
    assert list(texts) == [field.name for field in dataclasses.fields(config)]
    for name, text in texts.items():
        assert re.fullmatch(r"[^\n]+\.", text), name


def test_engine_options_appear_in_the_help_with_their_docstrings() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "250", "TERM": "dumb", "NO_COLOR": "1"})
    output = " ".join(result.output.split())
    for name, text in field_help(EngineOptions).items():
        if name != "slug":
            assert f"--{name.replace('_', '-')}" in output
        assert text in output
    assert "--device" in output
    assert "--json" in output


def test_engine_options_that_are_not_given_are_the_classes_defaults() -> None:
    assert parse() == EngineOptions()


def test_engine_options_that_are_given_arrive_typed() -> None:
    words = "tiny-i2v --backend torch --precision bf16 --pixel-height 32 --pixel-width 48 --window-frames 9"
    options = parse(*words.split(), "--sink-frames", "3", "--random-weights", "-5", "--json", "--device", "cpu")
    assert options == EngineOptions(
        slug="tiny-i2v",
        backend="torch",
        precision="bf16",
        pixel_height=32,
        pixel_width=48,
        window_frames=9,
        sink_frames=3,
        random_weights=-5,
    )
    assert received["as_json"] is True
    assert received["device"] == "cpu"


def test_unknown_option_is_refused() -> None:
    result = CliRunner().invoke(app, ["--pixel-heigth", "32"])
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_every_engine_option_can_be_given() -> None:
    sample = {"str": "tiny", "int": "16", "Path": "x"}
    for field in dataclasses.fields(EngineOptions):
        if field.name in ("slug", "backend", "precision", "decoder"):
            continue
        value = sample[str(field.type).split(" ")[0]]
        options = parse(f"--{field.name.replace('_', '-')}", value)
        assert str(getattr(options, field.name)) == value


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(slug="tiny"),
        EngineOptions(slug="tiny", random_weights=7),
        EngineOptions(slug="tiny", random_weights=0),
        EngineOptions(slug="tiny-i2v", backend="torch", precision="bf16", pixel_height=32, pixel_width=48),
        EngineOptions(slug="tiny", window_frames=9, sink_frames=3),
        EngineOptions(slug="shapes-framewise"),
        EngineOptions(slug="shapes", random_weights=0),
        EngineOptions(slug="causal-forcing-wan2.1-t2v-1.3b-chunkwise"),
        EngineOptions(slug="causal-forcing-wan2.1-t2v-1.3b-framewise", random_weights=0),
    ],
    ids=str,
)
def test_build_command_parsed_again_gives_the_same_engine(options: EngineOptions) -> None:
    config = resolved(options)
    program, *words = shlex.split(config.build_command())
    assert program == "cf-build"
    assert resolved(parse(*words)).fingerprint() == config.fingerprint()


def resolved(options: EngineOptions) -> EngineConfig:
    weights = weights_identity(options)
    assert weights is not None
    return resolve_engine(options, weights=weights, device="cpu")
