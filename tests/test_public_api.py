"""The public names of the three packages: exactly these, and importing a package loads no framework."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from causal_forcing.runtime import errors

PUBLIC = {
    "causal_forcing.runtime": [
        *("BackendUnavailableError", "BuildLockedError", "CausalForcingError", "CheckpointError", "Chunk"),
        *("ClipRecord", "ClipRequest", "EngineDamagedError", "EngineMismatchError", "EngineNotFoundError"),
        *("EngineOptions", "EngineSet", "FrameSink", "GenerateConfig", "GivenNoise", "ImageError", "ImageFit"),
        *("NoiseSource", "OutputError", "PlanError", "PromptCache", "PromptError", "PromptNotKept", "PromptTruncated"),
        "RanksEndedError",
        *(
            "RecordError",
            "RequirementError",
            "SeededNoise",
            "TensorRTError",
            "UnknownNameError",
            "UsageError",
            "VideoSession",
            "WeightsMissingError",
        ),
        *("find_or_build", "load_engines", "load_image", "make_clip", "open_sink"),
    ],
    "causal_forcing.build_engines": [
        *("BuildJob", "BuildPlan", "OutputComparison", "build", "make_job", "plan_build", "verify"),
    ],
    "causal_forcing.plugins": ["kv_cache_attention"],
}

FRAMEWORKS = ("torch", "onnx", "onnxruntime", "transformers", "numpy", "rich")


@pytest.mark.parametrize("package", PUBLIC)
def test_all_is_the_public_list_sorted(package: str) -> None:
    names = importlib.import_module(package).__all__
    assert names == PUBLIC[package]
    assert names == sorted(names)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_there_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    for name in PUBLIC[package]:
        thing = getattr(module, name)
        assert thing.__module__.startswith(package), f"{name} comes from {thing.__module__}"
        assert inspect.getdoc(thing), f"{package}.{name} has no docstring"
        assert name in dir(module)


@pytest.mark.parametrize("package", PUBLIC)
def test_another_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match="no attribute 'generate_vidoe'"):
        _ = importlib.import_module(package).generate_vidoe


def test_every_error_is_public() -> None:
    tree = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert tree == {name for name in PUBLIC["causal_forcing.runtime"] if name.endswith("Error")}


@pytest.mark.parametrize("package", PUBLIC)
def test_importing_a_package_imports_no_framework(package: str) -> None:
    code = f"import sys, {package}; print(*sorted(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(FRAMEWORKS) & set(finished.stdout.split())
