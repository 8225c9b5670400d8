"""Options to an engine: what weights they stand for, and whether an engine fits them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import (
    BackendUnavailableError,
    EngineMismatchError,
    UnknownNameError,
    UsageError,
    WeightsMissingError,
)
from causal_forcing.runtime.manifest import Manifest
from causal_forcing.runtime.resolution import check_fits, default_root, resolve_engine, taehv_file, weights_identity
from causal_forcing.runtime.variant import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_REVISION,
    VARIANTS,
    WAN_REPOSITORY,
    WAN_REVISION,
)

CHUNKWISE = "causal-forcing-wan2.1-t2v-1.3b-chunkwise"
BUILT = EngineOptions(
    slug="tiny",
    backend="torch",
    precision="fp32",
    pixel_height=32,
    pixel_width=48,
    window_frames=9,
    sink_frames=3,
    random_weights=4,
)


def manifest(options: EngineOptions = BUILT) -> Manifest:
    weights = weights_identity(options)
    assert weights is not None
    return Manifest(config=resolve_engine(options, weights=weights, device="cpu"), networks=(), artefacts={}, files={})


def test_weights_identity_of_a_test_model_is_seed_0_unless_a_seed_is_given() -> None:
    assert weights_identity(EngineOptions(slug="tiny")) == "random:0"
    assert weights_identity(EngineOptions(slug="tiny", random_weights=3)) == "random:3"
    assert weights_identity(EngineOptions(slug=CHUNKWISE, random_weights=0)) == "random:0"


def test_weights_identity_of_a_release_is_both_repositories_at_their_pins() -> None:
    identity = weights_identity(EngineOptions(slug=CHUNKWISE))
    assert identity == (
        f"hub:{CHECKPOINT_REPOSITORY}@{CHECKPOINT_REVISION[:12]}/chunkwise/causal_forcing.pt"
        f"+{WAN_REPOSITORY}@{WAN_REVISION[:12]}"
    )


def test_weights_identity_of_the_included_model_is_its_pin_unless_a_seed_is_given() -> None:
    assert weights_identity(EngineOptions()) == f"included:{VARIANTS['shapes'].included_weights}"
    assert weights_identity(EngineOptions(slug="shapes-i2v")) == weights_identity(EngineOptions(slug="shapes"))
    assert weights_identity(EngineOptions(slug="shapes", random_weights=0)) == "random:0"


def test_fingerprint_of_the_included_model_changes_with_its_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        weights = weights_identity(EngineOptions(slug="shapes"))
        assert weights is not None
        return resolve_engine(EngineOptions(slug="shapes"), weights=weights, device="cpu").fingerprint()

    before = fingerprint()
    repinned = dataclasses.replace(VARIANTS["shapes"], included_weights="shapes@0123456789ab")
    monkeypatch.setitem(VARIANTS, "shapes", repinned)
    assert fingerprint() != before


@pytest.mark.parametrize("slug", [CHUNKWISE, "shapes"])
@pytest.mark.parametrize("files", [{"checkpoint": Path("a.pt")}, {"wan_folder": Path("wan")}])
def test_weights_identity_of_the_users_files_is_left_to_the_build(slug: str, files: dict[str, Any]) -> None:
    assert weights_identity(EngineOptions(slug=slug, **files)) is None


@pytest.mark.parametrize(("decoder", "file"), [("taehv", "taew2_1.pth"), ("lighttae", "lighttaew2_1.safetensors")])
def test_weights_identity_of_pinned_files_and_a_tiny_decoders_has_its_hash(
    decoder: str, file: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(b"weights")
    options = EngineOptions(slug=CHUNKWISE, decoder=decoder, taehv=tmp_path / file)
    pinned = weights_identity(EngineOptions(slug=CHUNKWISE))
    assert weights_identity(options) == f"{pinned}+taehv:{hashlib.sha256(b'weights').hexdigest()}"
    assert weights_identity(EngineOptions(slug="tiny", decoder=decoder)) == "random:0"
    assert weights_identity(EngineOptions(slug="tiny", decoder=decoder, taehv=tmp_path / file)) is None


def test_taehv_file_is_the_given_one_else_the_released_one_in_the_wan_folder(tmp_path: Path) -> None:
    for name in ("mine.pth", "taew2_1.safetensors", "lighttaew2_1.pth"):
        (tmp_path / name).touch()
    folder = EngineOptions(slug=CHUNKWISE, decoder="taehv", wan_folder=tmp_path)
    assert taehv_file(folder) == tmp_path / "taew2_1.safetensors"
    assert taehv_file(dataclasses.replace(folder, decoder="lighttae")) == tmp_path / "lighttaew2_1.pth"
    assert taehv_file(dataclasses.replace(folder, taehv=tmp_path / "mine.pth")) == tmp_path / "mine.pth"


def test_taehv_file_missing_names_the_command_that_brings_it(tmp_path: Path) -> None:
    options = EngineOptions(slug=CHUNKWISE, decoder="taehv")
    with pytest.raises(WeightsMissingError, match=r"no file was named; .*`curl -LO https://.*/taew2_1.pth`, then pass"):
        weights_identity(options)
    in_folder = dataclasses.replace(options, wan_folder=tmp_path, decoder="lighttae")
    with pytest.raises(WeightsMissingError, match=r"no .*/lighttaew2_1.pth or .*`hf download lightx2v/Autoencoders"):
        taehv_file(in_folder)


def test_resolve_engine_with_a_tiny_decoder_for_a_model_without_one_is_refused() -> None:
    with pytest.raises(UsageError, match="no taehv was trained for the latents of shapes: leave out --decoder"):
        resolve_engine(EngineOptions(slug="shapes", decoder="taehv"), weights="", device="cpu")


def test_resolve_engine_on_a_cpu_takes_the_first_backend_and_fp32() -> None:
    config = resolve_engine(EngineOptions(slug="tiny"), weights="random:0", device="cpu")
    assert (config.backend, config.backend_version, config.precision) == ("onnxruntime", "opset24", "fp32")
    assert (config.weights, config.decoder, config.variant.slug) == ("random:0", "wan", "tiny")


def test_resolve_engine_with_an_unknown_slug_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tiny-i2v'"):
        resolve_engine(EngineOptions(slug="tiny-i2w"), weights="random:0", device="cpu")


def test_resolve_engine_with_a_precision_the_backend_lacks_is_refused() -> None:
    options = EngineOptions(slug="tiny", backend="onnxruntime", precision="bf16")
    with pytest.raises(UsageError, match="backend 'onnxruntime' does not run bf16: use --precision fp32"):
        resolve_engine(options, weights="random:0", device="cpu")


def test_check_fits_with_the_options_it_was_built_from_passes() -> None:
    check_fits(manifest(), BUILT)


def test_check_fits_with_the_slug_alone_passes() -> None:
    check_fits(manifest(), EngineOptions(slug="tiny"))


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("slug", "tiny-i2v", "tiny"),
        ("backend", "onnxruntime", "torch"),
        ("precision", "bf16", "fp32"),
        ("pixel_height", 48, 32),
        ("pixel_width", 64, 48),
        ("window_frames", 12, 9),
        ("sink_frames", 0, 3),
        ("decoder", "taehv", "wan"),
    ],
)
def test_check_fits_with_another_option_names_it_both_values_and_the_build(field: str, value: Any, got: Any) -> None:
    options = dataclasses.replace(BUILT, **{field: value})
    with pytest.raises(EngineMismatchError) as caught:
        check_fits(manifest(), options)
    message = str(caught.value)
    assert caught.value.field == field
    assert f"{field} is {got}, expected {value}; rebuild it: cf-build {options.slug}" in message
    if field != "slug":
        assert f"--{field.replace('_', '-')} {value}" in message
    assert "\n" not in message


def test_check_fits_with_another_seed_names_the_weights() -> None:
    options = dataclasses.replace(BUILT, random_weights=5)
    with pytest.raises(EngineMismatchError, match=r"weights is random:4, expected random:5.*--random-weights 5"):
        check_fits(manifest(), options)


def test_default_root_lies_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUSAL_FORCING_HOME", "/somewhere")
    assert default_root() == Path("/somewhere/engines")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_resolve_engine_of_an_rtx_plan_to_build_is_complete_without_a_gpu() -> None:
    options = EngineOptions(slug="tiny", backend="tensorrt-rtx")
    config = resolve_engine(options, weights="random:0", device="auto", for_build=True)
    assert (config.backend, config.precision, config.dtype) == ("tensorrt-rtx", "bf16", "bfloat16")
    assert config.backend_version == importlib.metadata.version("tensorrt_rtx")
    assert config.plan == PlanOptions(compute_capabilities=(86, 89, 120))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_resolve_engine_of_an_rtx_plan_to_run_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="'tensorrt-rtx' needs a CUDA GPU and torch sees none"):
        resolve_engine(EngineOptions(slug="tiny", backend="tensorrt-rtx"), weights="random:0")


def test_resolve_engine_without_plans_has_no_plan_options() -> None:
    assert resolve_engine(EngineOptions(slug="tiny"), weights="random:0", device="cpu").plan is None
