"""Command-line options that are made from `EngineOptions`."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from causal_forcing.runtime.backends import Backend
from causal_forcing.runtime.cli_options import AsJson, Device, field_help, takes_engine_options
from causal_forcing.runtime.config import EngineConfig, GenerateConfig, PlanOptions
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.resolution import resolve_engine, weights_identity
from causal_forcing.runtime.variant import Variant

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")

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


@pytest.mark.parametrize("config", [EngineOptions, EngineConfig, PlanOptions, GenerateConfig, Geometry, Variant])
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
    sample = {"str": "tiny", "int": "16", "Path": "x", "list[int]": "89"}
    for field in dataclasses.fields(EngineOptions):
        if field.name in ("slug", "backend", "precision", "decoder"):
            continue
        value = {"plugin": "quick", "optimization_level": "5"}.get(field.name, sample[str(field.type).split(" ")[0]])
        beside = ("--decoder", "taehv") if field.name == "taehv" else ()
        options = parse(f"--{field.name.replace('_', '-')}", value, *beside)
        assert str(getattr(options, field.name)).strip("[]") == value


def test_compute_capability_is_repeatable_and_its_order_is_nothing() -> None:
    options = parse("--compute-capability", "120", "--compute-capability=86", "--compute-capability", "120")
    assert options.compute_capability == [86, 120]
    assert options == parse("--compute-capability", "86", "--compute-capability", "120")


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(slug="tiny"),
        EngineOptions(slug="tiny", random_weights=7),
        EngineOptions(slug="tiny", random_weights=0),
        EngineOptions(slug="tiny", decoder="taehv"),
        EngineOptions(slug="causal-forcing-wan2.1-t2v-1.3b-chunkwise", decoder="lighttae", random_weights=0),
        EngineOptions(slug="tiny-i2v", backend="torch", precision="bf16", pixel_height=32, pixel_width=48),
        EngineOptions(slug="tiny", window_frames=9, sink_frames=3),
        EngineOptions(slug="shapes-framewise"),
        EngineOptions(slug="shapes", random_weights=0),
        EngineOptions(slug="causal-forcing-wan2.1-t2v-1.3b-chunkwise"),
        EngineOptions(slug="causal-forcing-wan2.1-t2v-1.3b-framewise", random_weights=0),
        pytest.param(EngineOptions(backend="tensorrt-rtx"), marks=needs_rtx),
        pytest.param(EngineOptions(backend="tensorrt-rtx", compute_capability=[120]), marks=needs_rtx),
        pytest.param(EngineOptions(backend="tensorrt-rtx", compute_capability=[121, 80]), marks=needs_rtx),
        pytest.param(EngineOptions(backend="tensorrt-rtx", compute_capability=[120, 89, 86]), marks=needs_rtx),
        pytest.param(EngineOptions(backend="tensorrt-rtx", precision="fp8"), marks=needs_rtx),
        pytest.param(
            EngineOptions(backend="tensorrt-rtx", precision="fp16", optimization_level=0, workspace_mib=64),
            marks=needs_rtx,
        ),
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
    return resolve_engine(options, weights=weights, device="cpu", for_build=True)


@pytest.mark.parametrize("plugin", ["python", "quick"])
def test_build_command_of_a_tensorrt_plan_parsed_again_gives_the_same_engine(
    plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "tensorrt" else name))
    monkeypatch.setattr(Backend, "artefact_version", lambda self: "11.4.0.106")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def resolve(options: EngineOptions) -> EngineConfig:
        return resolve_engine(options, weights="random:0", device="cuda", for_build=True)

    config = resolve(EngineOptions(slug="tiny", backend="tensorrt", plugin=plugin, precision="fp8"))
    _, *words = shlex.split(config.build_command())
    assert ("--plugin" in words) == (plugin == "quick"), "defaults are not said"
    assert resolve(parse(*words)).fingerprint() == config.fingerprint()


@needs_rtx
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compute-capability", "90"], "--compute-capability 90 is not one that TensorRT-RTX serves: use 80, 86, 89"),
        (["--precision", "fp8", "--compute-capability", "86"], "--precision fp8 needs compute capability 89 or above"),
        (["--plugin", "python"], "--plugin is for the tensorrt backend"),
        (["--plugin", "pyhton"], "unknown plugin 'pyhton': did you mean 'python'?"),
        (["--optimization-level", "6"], "--optimization-level 6 is out of range: use 0 to 5"),
        (["--workspace-mib", "0"], "--workspace-mib 0 leaves no memory: use 1 or more"),
        (["--backend", "onnxruntime", "--compute-capability", "89"], "--compute-capability is for TensorRT plans, not"),
        (["--window-frames", "8"], "lets chunks of 3 wrap around the cache"),
        (["--precision", "fp32"], "backend 'tensorrt-rtx' does not run fp32: use --precision bf16 or fp16 or fp8"),
    ],
)
def test_plan_options_that_do_not_go_together_are_refused_before_anything_is_built(
    words: list[str], message: str, refuses: Callable[..., str]
) -> None:
    backend = [] if "--backend" in words else ["--backend", "tensorrt-rtx"]
    for command in ("build", "plan"):
        assert message in refuses("cf-build", command, "tiny", *backend, *words, code=2)


@needs_rtx
@pytest.mark.parametrize(
    ("window", "sink"), [(8, 0), (9, 1), (10, 3), (4, 1), (3, 0), (21, 4), (5, 2)], ids=lambda value: str(value)
)
def test_uneven_ring_on_rtx_is_refused_with_options_that_work(window: int, sink: int) -> None:
    options = EngineOptions(slug="tiny", backend="tensorrt-rtx", window_frames=window, sink_frames=sink)
    if options.geometry().ring_is_chunk_aligned:
        assert resolved(options).geometry.window_frames == window
        return
    with pytest.raises(UsageError) as caught:
        resolved(options)
    found = re.search(r"use (--window-frames \d+ --sink-frames \d+), or another backend$", str(caught.value))
    assert found is not None
    again = resolved(parse("tiny", "--backend", "tensorrt-rtx", *found[1].split()))
    assert again.geometry.window_frames <= window
    assert resolved(dataclasses.replace(options, backend="torch")).geometry.window_frames == window
