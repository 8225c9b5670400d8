"""Engine directories to engines: what is loaded, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from causal_forcing.runtime import loading
from causal_forcing.runtime.backends import Backend
from causal_forcing.runtime.config import SCHEMA_VERSION, PlanOptions, fingerprint_of
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines.tensorrt_runtime import check_plans
from causal_forcing.runtime.errors import (
    BackendUnavailableError,
    EngineDamagedError,
    EngineMismatchError,
    EngineNotFoundError,
    UsageError,
)
from causal_forcing.runtime.loading import load_engine, load_engines
from causal_forcing.runtime.manifest import MANIFEST_NAME, Manifest, describe_files, read_manifest
from causal_forcing.runtime.resolution import default_root, resolve_engine
from causal_forcing.runtime.session import VideoSession


def rehash(folder: Path) -> None:
    """Make the manifest agree with files that were changed on purpose."""
    dataclasses.replace(read_manifest(folder), files=describe_files(folder)).write(folder)


@pytest.fixture
def copied(tiny_engine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_engine, tmp_path / "engine")


@pytest.fixture
def copied_torch(tiny_torch_engine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_torch_engine, tmp_path / "engine")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_load_engines_of_a_built_directory_gives_every_network_on_the_cpu(device: str, tiny_engine: Path) -> None:
    engines = load_engines(str(tiny_engine), device=device)
    assert engines.text_encoder is not None
    later = [network.name for network in engines.text_encoder.networks]
    assert later == ["text_encoder"]
    assert [*engines.engines, *later] == [network.name for network in engines.manifest.networks]
    assert {"dit_step", "dit_context", "vae_decoder"} <= set(engines.engines)
    assert all(engine.spec.name == name for name, engine in engines.engines.items())
    assert engines.device == torch.device("cpu")
    assert engines.tokenizer_folder.is_dir()
    assert engines.folder == tiny_engine


def test_load_engines_of_a_moved_directory_works(copied: Path) -> None:
    assert load_engines(copied, device="cpu").folder == copied


def test_load_engines_of_no_directory_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFoundError, match="cf-build SLUG"):
        load_engines(tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize("name", ["dit_step.onnx", "tokenizer/tokenizer.json"])
def test_load_engines_with_a_missing_file_names_it_and_the_build(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(EngineDamagedError, match=f"{name}.*cf-build tiny --pixel-height 32 --pixel-width 48"):
        load_engines(copied, device="cpu")


def test_load_engines_with_an_altered_weight_is_refused_before_it_runs(copied: Path) -> None:
    path = copied / "dit_step.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineDamagedError, match=r"dit_step\.onnx"):
        load_engines(copied, device="cpu")


def test_load_engines_leaves_the_files_of_the_text_encoder_alone_until_a_prompt_needs_it(copied: Path) -> None:
    (copied / "text_encoder.onnx").unlink()
    with VideoSession(load_engines(copied, device="cpu")) as session:
        assert "token_ids" in session._io
        with pytest.raises(EngineDamagedError, match=r"text_encoder\.onnx is missing; rebuild it: cf-build tiny"):
            session.generate("a fox")
        assert next(session.generate(torch.zeros(1, 512, 32), total_blocks=1)).latents.isfinite().all()


def test_load_engines_finds_damage_in_the_text_encoder_when_a_prompt_needs_it(copied: Path) -> None:
    path = copied / "text_encoder.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with (
        VideoSession(load_engines(copied, device="cpu")) as session,
        pytest.raises(EngineDamagedError, match=r"text_encoder\.onnx is damaged"),
    ):
        session.generate("a fox")


def test_load_engines_with_an_unknown_use_of_the_text_encoder_names_the_known_ones(tiny_engine: Path) -> None:
    with pytest.raises(UsageError, match="unknown use of the text encoder 'keeps': did you mean 'keep'"):
        load_engines(tiny_engine, text_encoder="keeps")


def test_load_engine_of_a_file_that_onnxruntime_cannot_read_says_so_in_a_line(copied: Path) -> None:
    (copied / "dit_step.onnx").write_bytes(b"not an ONNX file")
    rehash(copied)
    with pytest.raises(EngineDamagedError, match=r"ONNX Runtime cannot load .*dit_step\.onnx.*cf-build") as caught:
        load_engines(copied, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_load_engine_of_a_file_that_torch_cannot_read_says_so_in_a_line(copied_torch: Path) -> None:
    (copied_torch / "timestep_modulation.pt2").write_bytes(b"not an exported program")
    rehash(copied_torch)
    with pytest.raises(EngineDamagedError, match=r"torch cannot load .*timestep_modulation\.pt2.*cf-build") as caught:
        load_engine(copied_torch, read_manifest(copied_torch), "timestep_modulation", torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_load_engines_for_a_gpu_that_is_not_there_is_refused(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs a CUDA GPU and torch sees none: use --device cpu"):
        load_engines(tiny_engine, device="cuda")


def test_load_engines_of_a_cpu_backend_on_a_gpu_machine_stays_on_the_cpu_unless_told(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_engines(tiny_engine, device="auto").device == torch.device("cpu")
    with pytest.raises(UsageError, match="'onnxruntime' runs on the CPU only"):
        load_engines(tiny_engine, device="cuda")


VERSION = "1.7.1.116"


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine directory of a plan, on a machine with the GPU and the TensorRT that it is for.

    The plan itself is not there: whatever refuses the directory did so without reading it.
    """
    monkeypatch.setenv("CAUSAL_FORCING_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(Backend, "installed", lambda self: True)
    monkeypatch.setattr(Backend, "artefact_version", lambda self: VERSION)
    return write_plans(default_root())


def write_plans(root: Path, *, backend: str = "tensorrt-rtx", precision: str = "bf16") -> Path:
    options = EngineOptions(slug="tiny", backend="torch", precision="bf16")
    config = dataclasses.replace(
        resolve_engine(options, weights="random:0", device="cpu"),
        backend=backend,
        backend_version=VERSION,
        precision=precision,
        plan=PlanOptions(compute_capabilities=(89, 120)),
    )
    folder = config.folder(root)
    folder.mkdir(parents=True)
    (folder / "dit_step.plan").write_bytes(b"plan")
    Manifest(config=config, networks=(), artefacts={}, files=describe_files(folder)).write(folder)
    (folder / "dit_step.plan").unlink()
    return folder


def test_plan_for_this_machine_is_read(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "engine_loader", check_plans)  # up to where TensorRT would be imported
    with pytest.raises(EngineDamagedError, match=r"dit_step\.plan is missing"):
        load_engines(plans)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_plan_of_another_version_is_refused_before_it_is_read(
    backend: str, plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_plans(default_root(), backend=backend, precision="fp16")
    monkeypatch.setattr(Backend, "artefact_version", lambda self: "1.8.0.1")
    with pytest.raises(EngineMismatchError) as caught:
        load_engines(folder)
    assert caught.value.field == "backend_version"
    assert f"backend_version is {backend} {VERSION}, expected 1.8.0.1; rebuild it: " in str(caught.value)
    assert str(caught.value).partition("rebuild it: ")[2].startswith(f"cf-build tiny --backend {backend}")


@pytest.mark.parametrize(
    ("backend", "precision", "here", "command"),
    [
        ("tensorrt-rtx", "fp16", 86, "cf-build tiny --backend tensorrt-rtx --precision fp16"),
        ("tensorrt-rtx", "fp8", 86, "cf-build tiny --backend tensorrt-rtx --precision bf16"),
        (
            *("tensorrt-rtx", "fp16", 80),
            "cf-build tiny --backend tensorrt-rtx --precision fp16 "
            "--compute-capability=80 --compute-capability=89 --compute-capability=120",
        ),
        ("tensorrt", "fp16", 90, "cf-build tiny --backend tensorrt --precision fp16"),
    ],
)
def test_plan_of_another_gpu_is_refused_before_it_is_read_with_the_command_for_this_one(
    backend: str, precision: str, here: int, command: str, plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(here, 10))
    folder = write_plans(default_root(), backend=backend, precision=precision)
    with pytest.raises(EngineMismatchError) as caught:
        load_engines(folder)
    assert str(caught.value) == (
        f"the engine does not fit: compute_capabilities is sm_89, sm_120, expected sm_{here}, the GPU of this machine; "
        f"rebuild it: {command}"
    )


def test_plan_elsewhere_than_in_the_cache_is_rebuilt_where_it_is(
    plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_plans(tmp_path / "my engines", precision="fp16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(EngineMismatchError, match=r"--precision fp16 --output '.*/my engines'$"):
        load_engines(folder)


def test_plan_of_another_schema_is_refused_before_it_is_read(plans: Path) -> None:
    path = plans / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["schema_version"] = SCHEMA_VERSION - 1
    content["config"]["schema_version"] = SCHEMA_VERSION - 1
    content["digest"] = fingerprint_of({name: value for name, value in content.items() if name != "digest"})
    path.write_text(json.dumps(content))
    with pytest.raises(
        EngineMismatchError, match=r"schema_version is 1, expected 2; rebuild it: cf-build tiny --backend"
    ):
        load_engines(plans)


def test_plan_on_a_gpu_that_its_backend_does_not_serve_names_other_backends(
    plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(BackendUnavailableError, match=r"does not run on sm_90.*use --backend tensorrt or torch"):
        load_engines(plans)


def test_plan_without_a_gpu_is_refused(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="'tensorrt-rtx' needs a CUDA GPU and torch sees none"):
        load_engines(plans)
