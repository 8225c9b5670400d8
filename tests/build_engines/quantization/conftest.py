"""A small fp8 job of the `tiny` model, and its calibration."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from causal_forcing.build_engines.builder import BuildJob
from causal_forcing.build_engines.planner import make_job
from causal_forcing.build_engines.quantization import passes
from causal_forcing.build_engines.quantization.calibration import Calibration, calibrate
from causal_forcing.runtime.engine_options import EngineOptions


@pytest.fixture(scope="package")
def tiny_fp8_job() -> BuildJob:
    """`tiny` at 32×48 with a window of two chunks, for ONNX Runtime."""
    options = EngineOptions(
        slug="tiny",
        backend="onnxruntime",
        precision="fp8",
        random_weights=0,
        pixel_height=32,
        pixel_width=48,
        window_frames=6,
    )
    return make_job(options, device="cpu")


@pytest.fixture(scope="package")
def calibrate_tiny(tiny_fp8_job: BuildJob) -> Callable[[], Calibration]:
    """Calibrate it, over two clips for the sake of time."""

    def calibrate_two_clips() -> Calibration:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "PROMPTS", 2)
            return calibrate(tiny_fp8_job.source, tiny_fp8_job.config, tiny_fp8_job.tokenizer)

    return calibrate_two_clips


@pytest.fixture(scope="package")
def tiny_calibration(calibrate_tiny: Callable[[], Calibration]) -> Calibration:
    """Its calibration."""
    return calibrate_tiny()
