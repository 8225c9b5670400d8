"""Plans: reuse or build, why, and what it takes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.build_engines import planner
from causal_forcing.build_engines.builder import network_names
from causal_forcing.build_engines.model_loading import RandomModels, ReleasedModels
from causal_forcing.build_engines.planner import local_identity, make_job, plan_build
from causal_forcing.build_engines.weights import WeightFiles, included_folder
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.manifest import MANIFEST_NAME, Manifest, describe_files, read_manifest
from causal_forcing.runtime.resolution import resolve_engine, weights_identity
from causal_forcing.runtime.text import Tokenizer
from causal_forcing.runtime.variant import VARIANTS

BASE = EngineOptions(slug="tiny", backend="torch", precision="fp32", pixel_height=32, pixel_width=48)
CHUNKWISE = "causal-forcing-wan2.1-t2v-1.3b-chunkwise"


def put_engine(root: Path, options: EngineOptions = BASE, **config_changes: Any) -> Path:
    """Put an engine directory below the root that holds one file and no networks."""
    weights = weights_identity(options)
    assert weights is not None
    config: EngineConfig = resolve_engine(options, weights=weights, device="cpu")
    config = dataclasses.replace(config, **config_changes)
    folder = config.folder(root)
    folder.mkdir(parents=True)
    (folder / "dit_step.pt2").write_bytes(b"weights")
    Manifest(config=config, networks=(), artefacts={}, files=describe_files(folder)).write(folder)
    return folder


def test_plan_without_any_engine_builds(tmp_path: Path) -> None:
    plan = plan_build(BASE, tmp_path / "engines", device="cpu")
    assert not plan.reuse
    assert plan.reason == "no engine of tiny has been built"
    assert not (tmp_path / "engines").exists(), "a plan writes nothing"


def test_plan_with_the_engine_there_reuses_it(tmp_path: Path) -> None:
    folder = put_engine(tmp_path)
    plan = plan_build(BASE, tmp_path, device="cpu")
    assert plan.reuse
    assert plan.folder == folder
    assert plan.reason == "an engine with this fingerprint is there"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixel_width": 64}, "geometry.pixel_width (48, wanted 64)"),
        ({"window_frames": 12}, "geometry.window_frames (21, wanted 12)"),
        ({"precision": "bf16"}, "precision (fp32, wanted bf16)"),
        ({"decoder": "taehv"}, "decoder (wan, wanted taehv)"),
        ({"random_weights": 3}, "weights (random:0, wanted random:3)"),
    ],
)
def test_plan_with_another_option_builds_and_names_the_field_with_both_values(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    put_engine(tmp_path)
    plan = plan_build(dataclasses.replace(BASE, **change), tmp_path, device="cpu")
    assert not plan.reuse
    assert plan.reason == f"the nearest engine differs in {reason}"


@pytest.mark.parametrize("field", ["package_version", "op_digest"])
def test_plan_with_an_engine_of_another_version_names_it(field: str, tmp_path: Path) -> None:
    put_engine(tmp_path, BASE, **{field: "old"})
    plan = plan_build(BASE, tmp_path, device="cpu")
    assert not plan.reuse
    assert f"{field} (old, wanted " in plan.reason


def test_plan_with_several_engines_names_the_nearest(tmp_path: Path) -> None:
    put_engine(tmp_path, dataclasses.replace(BASE, pixel_height=64, precision="bf16", window_frames=9))
    put_engine(tmp_path, dataclasses.replace(BASE, pixel_height=64))
    assert plan_build(BASE, tmp_path, device="cpu").reason == (
        "the nearest engine differs in geometry.pixel_height (64, wanted 32)"
    )


def test_plan_with_a_damaged_engine_builds_and_says_what_is_wrong(tmp_path: Path) -> None:
    folder = put_engine(tmp_path)
    (folder / "dit_step.pt2").write_bytes(b"weight")
    plan = plan_build(BASE, tmp_path, device="cpu")
    assert not plan.reuse
    assert "the engine there cannot be used" in plan.reason
    assert "dit_step.pt2" in plan.reason
    (folder / MANIFEST_NAME).write_text("{")
    assert "not a readable manifest" in plan_build(BASE, tmp_path, device="cpu").reason


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 3}', '{"config": {"geometry": 1}}'])
def test_plan_with_a_damaged_neighbour_is_not_disturbed(content: str, tmp_path: Path) -> None:
    neighbour = put_engine(tmp_path, dataclasses.replace(BASE, pixel_height=64))
    (neighbour / MANIFEST_NAME).write_text(content)
    assert not plan_build(BASE, tmp_path, device="cpu").reuse


def test_plan_counts_the_bytes_of_weights_and_buffers_that_the_engine_has(tiny_torch_engine: Path) -> None:
    plan = plan_build(BASE, tiny_torch_engine.parents[1], device="cpu")
    assert plan.reuse
    manifest = read_manifest(tiny_torch_engine)
    assert list(plan.networks) == [network.name for network in manifest.networks]
    assert plan.buffer_bytes == IOTensors.measure(manifest.networks)
    for name, weight_bytes in plan.networks.items():
        file_bytes = manifest.files[manifest.artefacts[name]].bytes
        assert 0 < weight_bytes < file_bytes


def test_plan_summary_is_plain_json_and_complete(tmp_path: Path) -> None:
    plan = plan_build(BASE, tmp_path, device="cpu")
    summary = json.loads(json.dumps(plan.summary()))
    assert summary["engine_bytes"] == sum(plan.networks.values())
    assert summary["fingerprint"] == plan.config.fingerprint()
    assert summary["config"] == plan.config.fields()
    assert summary["folder"] == str(plan.config.folder(tmp_path))
    assert summary["downloads"] == []


def test_plan_of_a_release_needs_no_weights_and_lists_the_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a plan downloads nothing")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *arguments, **options: None)
    plan = plan_build(EngineOptions(slug=CHUNKWISE, backend="torch", precision="bf16"), tmp_path, device="cpu")
    assert list(plan.networks) == network_names(VARIANTS[CHUNKWISE])
    assert plan.downloads[0].filename == "chunkwise/causal_forcing.pt"
    assert not any(download.cached for download in plan.downloads)
    # 1.4 thousand million parameters of the denoiser, 2 bytes each; its caches hold 21 frames of 1560 tokens.
    assert plan.networks["dit_step"] == pytest.approx(2.8e9, rel=0.1)
    assert plan.buffer_bytes > 32760 * 1536 * 2 * 2 * 30


def test_plan_of_the_included_model_lists_no_downloads_whatever_is_given(tmp_path: Path) -> None:
    plan = plan_build(EngineOptions(slug="shapes"), tmp_path, device="cpu")
    assert (plan.reuse, plan.downloads) == (False, [])
    assert plan.config.weights == f"included:{VARIANTS['shapes'].included_weights}"
    own = plan_build(EngineOptions(slug="shapes", checkpoint=included_folder(VARIANTS["shapes"])), tmp_path)
    assert own.downloads == []
    assert own.config.weights.startswith("sha256:")


def test_job_of_the_included_model_reads_its_files() -> None:
    job = make_job(EngineOptions(slug="shapes"), device="cpu")
    folder = included_folder(VARIANTS["shapes"])
    assert folder is not None
    assert isinstance(job.source, ReleasedModels)
    assert job.source.files.dit == folder / "causal_forcing.safetensors"
    assert job.tokenizer == folder / "google/umt5-xxl"
    assert job.config.weights == f"included:{VARIANTS['shapes'].included_weights}"


@pytest.mark.parametrize(
    ("option", "roles"), [("checkpoint", {"dit"}), ("wan_folder", {"text_encoder", "vae", "tokenizer"})]
)
def test_job_of_the_included_model_takes_either_folder_from_elsewhere(
    option: str, roles: set[str], tmp_path: Path
) -> None:
    folder = included_folder(VARIANTS["shapes"])
    assert folder is not None
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    given: dict[str, Any] = {option: own}
    job = make_job(EngineOptions(slug="shapes", **given), device="cpu")
    assert isinstance(job.source, ReleasedModels)
    assert {role for role, path in job.source.files.paths().items() if path.is_relative_to(own)} == roles
    assert job.config.weights.startswith("sha256:")


def test_job_of_the_included_model_with_random_weights_keeps_its_tokenizer() -> None:
    job = make_job(EngineOptions(slug="shapes", random_weights=0), device="cpu")
    assert isinstance(job.source, RandomModels)
    assert job.config.weights == "random:0"
    assert job.tokenizer is not None, "the byte tokenizer has more tokens than the model"
    spec = VARIANTS["shapes"].model
    tokenizer = Tokenizer(job.tokenizer, length=spec.dit.text_len, pad_id=spec.text.pad_id)
    assert tokenizer.vocab_size <= spec.text.vocab_size


def test_job_of_a_test_model_has_random_weights_of_its_seed() -> None:
    job = make_job(dataclasses.replace(BASE, random_weights=5), device="cpu")
    assert job.config.weights == "random:5"
    assert isinstance(job.source, RandomModels)
    assert (job.source.seed, job.source.dtype) == (5, torch.float32)
    assert job.tokenizer is None


def test_job_with_options_that_do_not_go_together_is_refused_before_any_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(options: EngineOptions) -> WeightFiles:
        raise AssertionError("looked for weights first")

    monkeypatch.setattr(planner, "find_weights", refuse)
    with pytest.raises(UsageError, match="does not run bf16"):
        make_job(EngineOptions(slug=CHUNKWISE, backend="onnxruntime", precision="bf16"), device="cpu")


def test_local_identity_changes_with_any_files_content_and_not_with_their_place(tmp_path: Path) -> None:
    def files(folder: Path, changed: str = "") -> WeightFiles:
        folder.mkdir()
        for name in ("dit", "vae", "text", "tokenizer.json"):
            (folder / name).write_text(name + ("!" if name == changed else ""))
        return WeightFiles(dit=folder / "dit", vae=folder / "vae", text_encoder=folder / "text", tokenizer=folder)

    plain, moved = local_identity(files(tmp_path / "a")), local_identity(files(tmp_path / "b"))
    assert plain == moved
    assert plain.startswith("sha256:")
    changed = {
        local_identity(files(tmp_path / f"changed-{name}", name)) for name in ("dit", "vae", "text", "tokenizer.json")
    }
    assert len(changed | {plain}) == 5
