"""The quality gate, on random weights: noise reads as nothing, and the gate is about differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from causal_forcing.build_engines import quality
from causal_forcing.build_engines.builder import build
from causal_forcing.build_engines.cli import main
from causal_forcing.build_engines.planner import make_job
from causal_forcing.build_engines.shapes.evaluation import Scores, Share
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.resolution import default_root

RANDOM = ("shapes", "--random-weights", "0", "--backend", "torch", "--device", "cpu")


@pytest.fixture(scope="module")
def engine(engine_home: Path) -> Path:
    """The engine directory of `shapes` with random weights, torch in fp32: the reference."""
    options = EngineOptions(slug="shapes", backend="torch", precision="fp32", random_weights=0)
    job = make_job(options, device="cpu")
    folder = job.config.folder(default_root())
    build(job, folder)
    return folder


def verify(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Run `cf-build verify --quality`; returns exit code, stdout and stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["verify", *RANDOM, "--quality", "--prompts", "1", *arguments])
    return left.value.code, *capfd.readouterr()


def test_quality_of_the_reference_is_compared_with_what_is_wanted(
    engine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = verify(capfd, "--json")
    assert code == 1
    assert err.startswith("this engine is the reference: its scores are compared with the wanted ones\n")
    assert "not good enough: colour 0.0%, wanted 95%" in err
    report = json.loads(out)
    assert (report["reference"], report["psnr_db"]) == (None, None)
    assert report["engine"]["scores"]["colour"] == {"right": 0, "of": 1}


def test_quality_is_compared_with_the_reference_which_is_built_where_missing(
    engine: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other weights stand in for another precision, which a CPU runs slowly.
    monkeypatch.setattr(quality, "reference_options", lambda options: replace(options, random_weights=1))
    code, out, err = verify(capfd)
    header, mine, reference = out.splitlines()
    assert code == 0, err
    assert header.split("  ")[0] == "engine"
    assert mine.startswith("torch fp32  1      0.0%    0.0%   0.0%    0.0%        0.0%")
    assert mine.endswith(" dB")
    assert reference.startswith("torch fp32  1      0.0%    0.0%   0.0%    0.0%        0.0%")
    assert "building shapes for torch (the reference), fp32" in err
    assert "warning: the reference itself is not good enough: colour 0.0%, wanted 95%; motion" in err
    assert err.splitlines()[-1] == "as good as the reference"


def test_reference_is_torch_in_fp32_of_the_same_model() -> None:
    options = EngineOptions(slug="shapes-i2v", backend="onnxruntime", window_frames=12, random_weights=4)
    assert quality.reference_options(options) == replace(options, backend="torch", precision="fp32")


@pytest.mark.parametrize(
    ("right", "of", "reference", "fails"),
    [(44, 48, 46, False), (43, 48, 46, True), (48, 48, 40, False), (1, 3, 3, False)],
)
def test_losses_are_tolerated_up_to_two_prompts(right: int, of: int, reference: int, fails: bool) -> None:
    def scores(motion: int) -> Scores:
        whole = Share(right=of, of=of)
        return Scores(colour=whole, shape=whole, motion=Share(right=motion, of=of), background=whole, kept=whole)

    said = f"motion is right {right} times, the reference's {reference} times of {of}"
    assert quality.losses(scores(right), scores(reference)) == [said] * fails


def test_psnr_is_of_the_whole_clip() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert quality.psnr_db(black, black) == quality.HIGHEST_PSNR_DB
    assert quality.psnr_db(black, black + np.uint8(255)) == pytest.approx(0)
    assert quality.psnr_db(black, black + np.uint8(1)) == pytest.approx(48.13, abs=0.01)
