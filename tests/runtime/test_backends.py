"""Backends: which one is taken, why, and what is said where none can be."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from causal_forcing.runtime.backends import (
    BACKENDS,
    PLANNED_BACKENDS,
    choose_backend,
    choose_device,
    choose_precision,
)
from causal_forcing.runtime.errors import BackendUnavailableError, UnknownNameError, UsageError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are two CUDA GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def test_auto_on_a_cpu_takes_the_first_installed_and_says_why() -> None:
    backend, reason = choose_backend("auto", "cpu")
    assert backend.name == "onnxruntime"
    assert reason == "first backend installed here that runs on cpu"


def test_auto_without_the_first_backends_package_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime")
    assert choose_backend("auto", "cpu")[0].name == "torch"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_auto_on_a_gpu_takes_the_first_that_runs_there(device: str) -> None:
    backend, reason = choose_backend("auto", device)
    assert backend.name == "torch"
    assert "runs on cuda" in reason


def test_auto_without_any_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(BackendUnavailableError, match=r"no usable backend for cpu.*pip install onnxruntime"):
        choose_backend("auto", "cpu")


@pytest.mark.parametrize("name", list(BACKENDS))
def test_backend_by_name_is_taken(name: str) -> None:
    backend, reason = choose_backend(name, "cpu")
    assert (backend.name, reason) == (name, "chosen by name")


@pytest.mark.parametrize("name", list(BACKENDS))
def test_backend_by_name_without_its_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, name)
    with pytest.raises(BackendUnavailableError, match=f"{name!r} is not installed: pip install {name}"):
        choose_backend(name, "cpu")


@pytest.mark.parametrize("name", PLANNED_BACKENDS)
def test_planned_backend_says_that_it_is_not_there_and_what_is(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match="not part of this release: use --backend onnxruntime or torch"):
        choose_backend(name, "cpu")


def test_unknown_backend_offers_the_nearest_and_lists_auto_too() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backend 'torhc': did you mean 'torch'.*auto, onnxruntime"):
        choose_backend("torhc", "cpu")


@pytest.mark.usefixtures("gpu")
def test_cpu_backend_on_a_gpu_by_name_is_refused_with_both_ways_out() -> None:
    with pytest.raises(UsageError, match="runs on the CPU only: use --device cpu or --backend torch"):
        choose_backend("onnxruntime", "cuda")


def test_precision_that_is_not_given_is_fp32_on_a_cpu() -> None:
    for backend in BACKENDS.values():
        assert choose_precision(backend, None, "cpu") == "fp32"


@pytest.mark.usefixtures("gpu")
def test_precision_that_is_not_given_is_bf16_on_a_gpu_where_the_backend_has_it() -> None:
    assert choose_precision(BACKENDS["torch"], None, "cuda") == "bf16"
    assert choose_precision(BACKENDS["onnxruntime"], None, "cuda") == "fp32"


def test_precision_that_is_given_is_taken_if_the_backend_has_it() -> None:
    assert choose_precision(BACKENDS["torch"], "fp16", "cpu") == "fp16"
    with pytest.raises(UsageError, match="backend 'onnxruntime' does not run fp16: use --precision fp32"):
        choose_precision(BACKENDS["onnxruntime"], "fp16", "cpu")


def test_artefact_version_is_the_opset_or_the_librarys_major_and_minor() -> None:
    assert BACKENDS["onnxruntime"].artefact_version() == "opset24"
    full = importlib.metadata.version("torch")
    version = BACKENDS["torch"].artefact_version()
    assert full.startswith(f"{version}.")
    assert version.count(".") == 1


@pytest.mark.usefixtures("no_gpu")
def test_device_without_a_gpu_is_the_cpu_or_an_error() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(BackendUnavailableError, match=r"--device cuda:1 needs a CUDA GPU.*use --device cpu"):
        choose_device("cuda:1")


@pytest.mark.usefixtures("gpu")
def test_device_with_a_gpu_is_the_gpu_unless_the_cpu_is_named() -> None:
    assert choose_device("auto") == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    assert choose_device("cpu") == "cpu"


@pytest.mark.usefixtures("gpu")
def test_device_with_an_index_beyond_the_last_gpu_says_how_many_there_are() -> None:
    with pytest.raises(BackendUnavailableError, match="cuda:2 is not there, torch sees 2: use --device cuda"):
        choose_device("cuda:2")


@pytest.mark.parametrize("device", ["cda", "", "cpu:1", "auto:0", "cuda:", "cuda:x", "cuda:-1"])
def test_unknown_device_lists_the_valid_ones(device: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown device '{device}'.*valid: auto, cpu, cuda, cuda:N"):
        choose_device(device)
