"""Prompts that training never saw, clips of them through a session, and their scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from causal_forcing.build_engines.shapes.evaluation import (
    WANTED,
    Case,
    Scores,
    Share,
    draw_clips,
    first_frame,
    held_out_cases,
    make_clips,
    misses,
    pair_cases,
    score,
)
from causal_forcing.build_engines.shapes.world import BACKGROUNDS, SIZES, Scene, Thing
from causal_forcing.runtime.image import load_image
from causal_forcing.runtime.variant import VARIANTS


class DrawingSession:
    """Stands in for a session: hands out chunks of a drawn clip, and remembers what it was asked for."""

    def __init__(self, cases: list[Case], chunk_frames: int) -> None:
        self._cases = {case.prompt: case for case in cases}
        self._chunk_frames = chunk_frames
        self.asked: list[dict[str, Any]] = []

    def generate(self, prompt: str, **asked: Any) -> Iterator[SimpleNamespace]:
        self.asked.append(asked)
        (frames,) = draw_clips([self._cases[prompt]])
        end = 1 + 4 * (self._chunk_frames - 1)
        yield SimpleNamespace(frames=lambda: frames[:end])
        for index in range(1, asked["total_blocks"]):
            start = end + 4 * self._chunk_frames * (index - 1)
            yield SimpleNamespace(frames=lambda start=start: frames[start : start + 4 * self._chunk_frames])
        raise AssertionError("one chunk too many was asked for")


def config_of(slug: str) -> Any:
    variant = VARIANTS[slug]
    return SimpleNamespace(variant=variant, geometry=SimpleNamespace(chunk_frames=variant.chunk_frames))


def test_held_out_prompts_are_all_that_training_left_out_and_always_the_same() -> None:
    cases = held_out_cases()
    assert cases == held_out_cases()
    assert len({case.prompt for case in cases}) == len({case.seed for case in cases}) == len(cases) == 141
    asked = [(thing.colour, thing.shape, thing.motion) for case in cases for thing in case.scene.things]
    assert len(set(asked)) == len(set(asked[:47])) == 47
    assert all(thing.held_out for case in cases for thing in case.scene.things)
    assert {case.scene.background for case in cases[:47]} == set(BACKGROUNDS)
    assert {thing.size for case in cases[:47] for thing in case.scene.things} == set(SIZES)
    assert held_out_cases(5) == cases[:5]


def test_pairs_are_of_what_training_saw_and_always_the_same() -> None:
    cases = pair_cases(10)
    assert cases == pair_cases()[:10] != pair_cases()[10:20]
    assert all(len(case.scene.things) == 2 and not any(t.held_out for t in case.scene.things) for case in cases)


def test_first_frame_is_the_drawn_clips_as_load_image_gives_it(tmp_path: Path) -> None:
    from PIL import Image

    case = held_out_cases(1)[0]
    (frames,) = draw_clips([case])
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    loaded = load_image(str(tmp_path / "first.png"), pixel_height=128, pixel_width=128)
    np.testing.assert_allclose(first_frame(case), loaded, atol=1e-6)


@pytest.mark.parametrize(("slug", "chunks"), [("shapes", 3), ("shapes-framewise", 9), ("shapes-i2v", 9)])
def test_clips_are_whole_and_timed_after_the_first_chunk(slug: str, chunks: int) -> None:
    cases = held_out_cases(2)
    session = DrawingSession(cases, VARIANTS[slug].chunk_frames)
    clips = list(make_clips(session, config_of(slug), cases))  # type: ignore[arg-type]
    for clip, asked, case, drawn in zip(clips, session.asked, cases, draw_clips(cases), strict=True):
        assert (clip.frames == drawn).all()
        assert clip.later_frames == 33 - 1 - 4 * (VARIANTS[slug].chunk_frames - 1)
        assert clip.later_s > 0
        assert (asked["total_blocks"], asked["seed"]) == (chunks, case.seed)
        assert (asked["image"] is not None) == VARIANTS[slug].takes_image


def test_score_counts_objects_and_backgrounds() -> None:
    case = held_out_cases(1)[0]
    (thing,) = case.scene.things
    other = Thing(colour=thing.colour, shape=thing.shape, motion=thing.motion, size="small")
    wrong = Case(scene=Scene(things=(other,), background="none"), prompt="", seed=0)
    right = Share(right=2, of=2)
    got = score([case, wrong], [*draw_clips([case])] * 2)
    assert got == Scores(colour=right, shape=right, motion=right, background=Share(right=1, of=2), kept=right)


def test_score_of_one_object_where_two_are_seen_is_nothing() -> None:
    pair = pair_cases(1)
    case = Case(scene=Scene(things=pair[0].scene.things[:1], background=pair[0].scene.background), prompt="", seed=0)
    got = score([case], draw_clips(pair))
    assert [share.right for _, share in got.items()] == [0, 0, 0, 1, 0]


def test_misses_names_what_is_wanted_of_four_steps() -> None:
    half, none = Share(right=1, of=2), Share(right=0, of=0)
    poor = Scores(colour=half, shape=half, motion=half, background=half, kept=none)
    assert misses(poor, VARIANTS["shapes"])[0] == "colour 50.0%, wanted 95%"
    assert len(misses(poor, VARIANTS["shapes"])) == len(WANTED)
    assert misses(poor, VARIANTS["shapes-framewise-2step"]) == []
    assert none.fraction == 0
