"""Plans compiled in processes of their own: what comes back, and what is left when one fails, crashes or is stopped."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.build_engines.plans import process
from causal_forcing.build_engines.plans.job import PlanJob
from causal_forcing.build_engines.plans.process import compile_in_process
from causal_forcing.build_engines.plans.progress import ProgressTree
from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.errors import PlanError
from causal_forcing.runtime.tensorrt_library import LOGGER

MakeJob = Callable[..., PlanJob]


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Give a function of `plan_targets` that another process can import."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return lambda name: getattr(importlib.import_module("plan_targets"), name)


def test_plan_and_what_is_known_of_its_layers_are_written_and_progress_is_heard(
    make_plan_job: MakeJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_plan_job(folder=tmp_path)
    tree, depths = ProgressTree(), set[int]()

    def hear(event: tuple[Any, ...]) -> None:
        tree.take(event)
        depths.update(depth for depth, _ in tree.rows())

    with caplog.at_level(logging.INFO, logger=LOGGER.name):
        report = compile_in_process(job, on_event=hear)
    assert job.plan.stat().st_size == report.plan_bytes > 100_000
    assert report.peak_memory_bytes > 2**26
    known = json.loads(job.layers.read_text())
    assert known["aliases"] == dict(job.spec.states)
    assert known["precisions"]["KV_CACHE_UPDATE BF16"] == 4
    assert known["memory"]["cache_bytes"] == 4 * 2 * 36 * 32 * 2
    assert len(known["layers"]) < report.layers
    assert depths >= {0, 1, 2}, "the tree of phases has a root, children and theirs"
    assert not list(tree.rows()), "every phase that began has ended"
    assert "Detected" in caplog.text, "the builder's own messages come through logging"


def test_graph_that_is_not_there_is_told_in_one_line_and_leaves_nothing(make_plan_job: MakeJob, tmp_path: Path) -> None:
    broken = dataclasses.replace(make_plan_job(folder=tmp_path), onnx=tmp_path / "none.onnx")
    with pytest.raises(PlanError, match="compiling dit_step failed: FileNotFoundError") as caught:
        compile_in_process(broken)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_refusal_of_the_builder_carries_what_it_says_and_leaves_nothing(make_plan_job: MakeJob, tmp_path: Path) -> None:
    """sm_75 has no bf16: that is found out only while building."""
    job = make_plan_job(folder=tmp_path)
    job = dataclasses.replace(job, options=PlanOptions(compute_capabilities=(75,)))
    with pytest.raises(PlanError, match=r"tensorrt_rtx cannot build dit_step: .*sm75") as caught:
        compile_in_process(job)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "how"), [("crash", "was killed by SIGKILL"), ("leave", "ended with exit code 7")])
def test_process_that_dies_is_told_in_one_line(
    name: str, how: str, target: Callable[[str], Any], make_plan_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=f"the process that compiled dit_step {how} without a word"):
        compile_in_process(make_plan_job(folder=tmp_path), target=target(name))


def test_interrupt_cancels_the_build_and_waits_for_its_end(
    target: Callable[[str], Any], make_plan_job: MakeJob, tmp_path: Path
) -> None:
    job = make_plan_job(folder=tmp_path)

    def interrupt(event: tuple[Any, ...]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_in_process(job, on_event=interrupt, target=target("wait_for_cancel"))
    assert job.layers.read_text() == "asked: True"


def test_interrupt_of_a_real_build_ends_it_without_a_plan(make_plan_job: MakeJob, tmp_path: Path) -> None:
    job = make_plan_job(folder=tmp_path)

    def interrupt(event: tuple[Any, ...]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_in_process(job, on_event=interrupt)
    assert not list(tmp_path.iterdir())


def test_build_that_ignores_the_cancel_is_killed(
    target: Callable[[str], Any], make_plan_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CANCEL_S", 0.5)

    def interrupt(event: tuple[Any, ...]) -> None:
        raise KeyboardInterrupt

    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_in_process(make_plan_job(folder=tmp_path), on_event=interrupt, target=target("hang"))
    assert time.monotonic() - started_s < 60, "it would have slept for ten minutes"


def test_fingerprint_covers_builder_targets_precision_graph_and_options(make_plan_job: MakeJob) -> None:
    job = make_plan_job()
    others = [
        dataclasses.replace(job, builder_version="9.9"),
        dataclasses.replace(job, onnx_sha256="0" * 64),
        dataclasses.replace(job, precision="fp8"),
        dataclasses.replace(job, backend="tensorrt"),
        dataclasses.replace(job, options=PlanOptions(compute_capabilities=(89,))),
        dataclasses.replace(job, options=PlanOptions(compute_capabilities=(89, 120), optimization_level=5)),
        dataclasses.replace(job, options=PlanOptions(compute_capabilities=(89, 120), workspace_mib=64)),
        dataclasses.replace(job, options=PlanOptions(compute_capabilities=(89, 120), plugin="quick")),
    ]
    fingerprints = {job.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(fingerprints) == len(others) + 1
    assert "op_digest" in job.identity()
