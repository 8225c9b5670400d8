"""Engine directories to engines: what is loaded, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from causal_forcing.runtime.errors import (
    BackendUnavailableError,
    EngineDamagedError,
    EngineNotFoundError,
    UsageError,
)
from causal_forcing.runtime.loading import load_engine, load_engines
from causal_forcing.runtime.manifest import describe_files, read_manifest


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
    assert list(engines.engines) == [network.name for network in engines.manifest.networks]
    assert {"dit_step", "dit_context", "vae_decoder", "text_encoder"} <= set(engines.engines)
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
