"""Backends: which one is taken, why, and what is said where none can be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from typing import Any

import pytest
import torch

from causal_forcing.runtime.backends import (
    BACKENDS,
    Backend,
    capability,
    choose_backend,
    choose_device,
    choose_plan,
    choose_precision,
)
from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import BackendUnavailableError, UnknownNameError, UsageError

TENSORRT, RTX = BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]
PLAN_BACKENDS = [backend for backend in BACKENDS.values() if backend.makes_plans]
OTHER_BACKENDS = [backend for backend in BACKENDS.values() if not backend.makes_plans]


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: int) -> None:
    """Pretend that there are CUDA GPUs of these generations."""

    def index(device: str) -> int:
        return int(device.partition(":")[2] or 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capabilities[index(device)], 10))


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Pretend that of all backends' modules these are here."""
    known = {backend.module for backend in BACKENDS.values()}
    find = importlib.util.find_spec
    here = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (here if name in modules else None) if name in known else find(name)
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are two GPUs of a generation that TensorRT-RTX does not serve."""
    pretend_gpus(monkeypatch, 90, 90)


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


@pytest.mark.parametrize(
    ("installed", "capabilities", "device", "taken"),
    [
        (("tensorrt", "tensorrt_rtx", "torch"), (90,), "auto", "tensorrt"),
        (("tensorrt", "tensorrt_rtx", "torch"), (89,), "cuda", "tensorrt"),
        (("tensorrt_rtx", "torch"), (89,), "auto", "tensorrt-rtx"),
        (("tensorrt_rtx", "torch"), (90,), "auto", "torch"),
        (("tensorrt_rtx", "torch"), (90, 120), "cuda:1", "tensorrt-rtx"),
        (("onnxruntime", "torch"), (120,), "cuda", "torch"),
        (("tensorrt", "triton", "torch"), (90,), "auto", "tensorrt"),
        (("tensorrt_rtx", "triton", "torch"), (90,), "auto", "cuda"),
        (("triton", "onnxruntime", "torch"), (80,), "cuda", "cuda"),
        (("triton", "onnxruntime", "torch"), (90, 90), "cuda:1", "cuda"),
    ],
)
def test_auto_on_a_gpu_takes_the_first_installed_that_runs_on_its_generation(
    installed: tuple[str, ...], capabilities: tuple[int, ...], device: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpus(monkeypatch, *capabilities)
    pretend_installed(monkeypatch, *installed)
    backend, reason = choose_backend("auto", device)
    assert backend.name == taken
    assert "runs on cuda" in reason


def test_auto_without_any_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(BackendUnavailableError, match=r"no usable backend for cpu.*pip install onnxruntime"):
        choose_backend("auto", "cpu")


def test_auto_on_a_cpu_leaves_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "triton", "onnxruntime", "torch")
    assert choose_backend("auto", "cpu")[0].name == "onnxruntime"


@pytest.mark.parametrize(
    "backend", [backend for backend in OTHER_BACKENDS if "cpu" in backend.runs_on], ids=lambda backend: backend.name
)
def test_backend_by_name_is_taken(backend: Backend) -> None:
    assert choose_backend(backend.name, "cpu") == (backend, "chosen by name")


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_backend_by_name_without_its_package_says_what_to_install(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, backend.module)
    package = {"cuda": "triton"}.get(backend.name, backend.name)
    with pytest.raises(BackendUnavailableError, match=f"{backend.name!r} is not installed: pip install {package}$"):
        choose_backend(backend.name, "cpu")


@pytest.mark.usefixtures("gpu")
def test_cuda_by_name_is_taken_on_a_gpu_to_build_and_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "tensorrt", "triton", "torch")
    for device, for_build in itertools.product(("auto", "cuda", "cuda:1"), (False, True)):
        assert choose_backend("cuda", device, for_build=for_build) == (BACKENDS["cuda"], "chosen by name")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("for_build", [False, True])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_cuda_without_a_gpu_neither_runs_nor_builds(
    device: str, for_build: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, "triton", "torch")
    with pytest.raises(BackendUnavailableError, match="'cuda' needs a CUDA GPU and torch sees none: use --backend onn"):
        choose_backend("cuda", device, for_build=for_build)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("backend", PLAN_BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_plan_backend_without_a_gpu_does_not_run(
    backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, "tensorrt", "tensorrt_rtx", "torch")
    with pytest.raises(BackendUnavailableError, match="needs a CUDA GPU and torch sees none: use --backend onnxrunt"):
        choose_backend(backend.name, device)


@pytest.mark.usefixtures("no_gpu")
def test_plan_backend_that_builds_without_a_gpu_is_taken_for_a_build_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "tensorrt", "tensorrt_rtx", "torch")
    assert choose_backend("tensorrt-rtx", "auto", for_build=True) == (RTX, "chosen by name")
    with pytest.raises(BackendUnavailableError, match="'tensorrt' needs a CUDA GPU"):
        choose_backend("tensorrt", "auto", for_build=True)


@pytest.mark.usefixtures("gpu")
def test_rtx_on_a_gpu_that_it_does_not_serve_says_which_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "tensorrt_rtx", "torch")
    with pytest.raises(BackendUnavailableError) as caught:
        choose_backend("tensorrt-rtx", "cuda")
    assert str(caught.value) == (
        "backend 'tensorrt-rtx' does not run on sm_90, expected one of sm_80, sm_86, sm_89, sm_120, sm_121: "
        "use --backend tensorrt or torch"
    )
    assert choose_backend("tensorrt-rtx", "cuda", for_build=True)[0] is RTX


def test_unknown_backend_offers_the_nearest_and_lists_auto_too() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backend 'torhc': did you mean 'torch'.*auto, tensorrt, tens"):
        choose_backend("torhc", "cpu")


@pytest.mark.usefixtures("gpu")
def test_cpu_backend_on_a_gpu_by_name_is_refused_with_both_ways_out() -> None:
    with pytest.raises(UsageError, match="runs on the CPU only: use --device cpu or --backend torch"):
        choose_backend("onnxruntime", "cuda")


def test_precision_that_is_not_given_is_fp32_on_a_cpu() -> None:
    for backend in OTHER_BACKENDS:
        assert choose_precision(backend, None, "cpu") == "fp32"


def test_precision_of_plans_that_is_not_given_is_bf16_wherever_they_are_built() -> None:
    for backend in PLAN_BACKENDS:
        assert choose_precision(backend, None, "cpu") == "bf16"
        with pytest.raises(
            UsageError, match=f"{backend.name!r} does not run fp32: use --precision bf16 or fp16 or fp8"
        ):
            choose_precision(backend, "fp32", "cpu")


@pytest.mark.usefixtures("gpu")
def test_precision_that_is_not_given_is_bf16_on_a_gpu_where_the_backend_has_it() -> None:
    assert choose_precision(BACKENDS["torch"], None, "cuda") == "bf16"
    assert choose_precision(BACKENDS["cuda"], None, "cuda") == "bf16"
    assert choose_precision(BACKENDS["onnxruntime"], None, "cuda") == "fp32"


def test_precision_that_is_given_is_taken_if_the_backend_has_it() -> None:
    assert choose_precision(BACKENDS["torch"], "fp16", "cpu") == "fp16"
    with pytest.raises(UsageError, match="backend 'cuda' does not run fp32: use --precision bf16 or fp16"):
        choose_precision(BACKENDS["cuda"], "fp32", "cuda")
    with pytest.raises(UsageError, match="backend 'onnxruntime' does not run fp16: use --precision fp32"):
        choose_precision(BACKENDS["onnxruntime"], "fp16", "cpu")


def test_artefact_version_is_the_opset_or_the_librarys_major_and_minor() -> None:
    assert BACKENDS["onnxruntime"].artefact_version() == "opset24"
    full = importlib.metadata.version("torch")
    version = BACKENDS["torch"].artefact_version()
    assert full.startswith(f"{version}.")
    assert version.count(".") == 1


def test_artefact_version_of_tapes_is_torchs_and_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cu130", "triton": "3.9.1"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    assert BACKENDS["cuda"].artefact_version() == "torch2.13+triton3.9"


@pytest.mark.parametrize("backend", PLAN_BACKENDS, ids=lambda backend: backend.name)
def test_artefact_version_of_plans_is_the_whole_version_of_whichever_distribution_is_there(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(distribution: str) -> str:
        if distribution != backend.distributions[1]:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return "11.4.0.106"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert backend.artefact_version() == "11.4.0.106"


def test_artefact_version_of_a_module_without_a_distribution_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        BackendUnavailableError, match=r"version of tensorrt_rtx cannot be told.*pip install tensorrt-rt"
    ):
        RTX.artefact_version()


def plan(backend: Backend, *, precision: str = "bf16", device: str = "cuda", **options: Any) -> PlanOptions | None:
    return choose_plan(backend, EngineOptions(slug="tiny", **options), precision, device)


@pytest.mark.parametrize("backend", OTHER_BACKENDS, ids=lambda backend: backend.name)
def test_plan_options_are_refused_by_backends_without_plans(backend: Backend) -> None:
    assert plan(backend, device="cpu") is None
    given: dict[str, Any] = {"compute_capability": [89], "optimization_level": 3, "workspace_mib": 1, "plugin": "quick"}
    for option, value in given.items():
        name = f"--{option.replace('_', '-')}"
        with pytest.raises(UsageError, match=f"{name} is for TensorRT plans, not for {backend.name!r}: leave it out"):
            plan(backend, device="cpu", **{option: value})


@pytest.mark.usefixtures("no_gpu")
def test_plan_of_rtx_is_for_three_generations_unless_told() -> None:
    assert plan(RTX, device="cpu") == PlanOptions(compute_capabilities=(86, 89, 120))
    assert plan(RTX, device="cpu", precision="fp8") == PlanOptions(compute_capabilities=(89, 120))
    told = plan(RTX, device="cpu", compute_capability=[120, 89, 120], optimization_level=0, workspace_mib=512)
    assert told == PlanOptions(compute_capabilities=(89, 120), optimization_level=0, workspace_mib=512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compute_capability": [90]},
            "--compute-capability 90 is not one that TensorRT-RTX serves: use 80, 86, 89, 1",
        ),
        ({"plugin": "python"}, "--plugin is for the tensorrt backend: TensorRT-RTX takes no plugins, leave it out"),
        ({"compute_capability": [86, 89], "precision": "fp8"}, "fp8 needs compute capability 89 or above, got 86: use"),
    ],
)
def test_plan_of_rtx_with_what_it_lacks_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(RTX, device="cpu", **options)


@pytest.mark.usefixtures("gpu")
def test_plan_of_tensorrt_is_for_the_gpu_that_is_here() -> None:
    assert plan(TENSORRT) == PlanOptions(compute_capabilities=(90,), plugin="python")
    assert plan(TENSORRT, compute_capability=[90], plugin="quick") == PlanOptions(
        compute_capabilities=(90,), plugin="quick"
    )
    with pytest.raises(UsageError, match="is for the GPU that builds it, sm_90: leave it out"):
        plan(TENSORRT, compute_capability=[89])


def test_plan_of_tensorrt_in_fp8_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 80)
    with pytest.raises(UsageError, match="fp8 needs compute capability 89 or above, got 80: use bf16"):
        plan(TENSORRT, precision="fp8")


def test_capability_is_the_gpus_generation_and_0_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 90, 121)
    assert [capability(device) for device in ("cpu", "cuda", "cuda:1")] == [0, 90, 121]


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


def test_fp8_of_cuda_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 86, 89)
    with pytest.raises(UsageError, match="--precision fp8 needs compute capability 89 or above, got 86: use bf16"):
        choose_precision(BACKENDS["cuda"], "fp8", "cuda:0")
    assert choose_precision(BACKENDS["cuda"], "fp8", "cuda:1") == "fp8"
