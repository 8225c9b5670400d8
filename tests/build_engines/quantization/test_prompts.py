"""Calibration sees nothing that an engine is scored on."""

from __future__ import annotations

import numpy as np
import pytest

from causal_forcing.build_engines.quantization import prompts
from causal_forcing.build_engines.quantization.passes import PROMPTS
from causal_forcing.build_engines.quantization.prompts import GENERAL_PROMPTS, calibration_prompts
from causal_forcing.build_engines.shapes.evaluation import held_out_cases, pair_cases
from causal_forcing.build_engines.shapes.world import Scene
from causal_forcing.runtime.model_spec import SHAPES, WAN21_T2V_1_3B


def test_prompts_of_shapes_show_no_object_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes: list[Scene] = []

    def caption(rng: np.random.Generator, scene: Scene) -> str:
        scenes.append(scene)
        return "a caption"

    monkeypatch.setattr(prompts, "write_caption", caption)
    calibration_prompts(SHAPES, 200)
    assert len(scenes) == 200
    assert not any(thing.held_out for scene in scenes for thing in scene.things)


def test_prompts_of_shapes_are_none_that_the_gate_asks_for() -> None:
    scored = {case.prompt for case in (*held_out_cases(), *pair_cases())}
    chosen = calibration_prompts(SHAPES, 200)
    assert len(set(chosen)) > 150
    assert not scored & set(chosen)


def test_prompts_are_the_same_every_time_and_enough_for_any_model() -> None:
    assert calibration_prompts(SHAPES, PROMPTS) == calibration_prompts(SHAPES, PROMPTS)
    assert calibration_prompts(WAN21_T2V_1_3B, PROMPTS) == list(GENERAL_PROMPTS[:PROMPTS])
    assert len(set(GENERAL_PROMPTS)) >= PROMPTS
