"""The measure: right about what the world draws, sharp or not, and about nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from causal_forcing.build_engines.shapes.evaluation import (
    Case,
    Frames,
    Scores,
    draw_clips,
    draw_noise,
    held_out_cases,
    pair_cases,
    score,
)
from causal_forcing.build_engines.shapes.measures import ThingReading, read_clip
from causal_forcing.build_engines.shapes.world import BACKGROUNDS, COLOURS, SHAPES, TRAINED_FRAMES, Tracks, render

Values = float | npt.NDArray[np.float64]
READ_RIGHT = 0.98

T = np.arange(TRAINED_FRAMES) / (TRAINED_FRAMES - 1)
"""Time of each frame, 0 to 1."""


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return held_out_cases()


@pytest.fixture(scope="module")
def drawn(cases: list[Case]) -> list[Frames]:
    return list(draw_clips(cases))


def fractions(scores: Scores) -> dict[str, float]:
    return {name: share.fraction for name, share in scores.items()}


def draw(
    *,
    x: Values = 64.0,
    y: Values = 64.0,
    radius: Values = 20.0,
    angle: Values = 0.0,
    shape: str = "triangle",
    colour: str = "red",
    background: str = "striped",
) -> Frames:
    """Draw one object as it is told, frame by frame."""
    as_track = {
        name: np.full((1, 1, TRAINED_FRAMES), value, np.float32)
        for name, value in {"x": x, "y": y, "radius": radius, "angle": angle}.items()
    }
    tracks = Tracks(
        **as_track,
        shape=np.array([[SHAPES.index(shape)]]),
        colour=np.array([[COLOURS[colour]]], np.float32),
        background=np.array([BACKGROUNDS.index(background)]),
        shade=np.zeros(1, np.float32),
    )
    return as_frames(render(tracks)[0].permute(0, 2, 3, 1).numpy())


def as_frames(pixels: npt.NDArray[np.floating]) -> Frames:
    frames: Frames = (np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return frames


def only(frames: Frames) -> ThingReading:
    (thing,) = read_clip(frames).things
    return thing


def blurred(rng: np.random.Generator, frames: Frames, pixels: float) -> Frames:
    soft = ImageFilter.GaussianBlur(pixels)
    return np.stack([np.asarray(Image.fromarray(frame).filter(soft)) for frame in frames])


def off_colour(rng: np.random.Generator, frames: Frames) -> Frames:
    """Shift all colours of the clip, and a little those of each frame."""
    shift = rng.uniform(-0.06, 0.06, 3) + rng.uniform(-0.02, 0.02, (len(frames), 1, 1, 3))
    return as_frames(frames / 255 + shift)


def noisy(rng: np.random.Generator, frames: Frames) -> Frames:
    return as_frames(frames / 255 + rng.normal(0, 0.03, frames.shape))


def test_measure_reads_drawn_scenes_right(cases: list[Case], drawn: list[Frames]) -> None:
    assert min(fractions(score(cases, drawn)).values()) >= READ_RIGHT


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda rng, frames: blurred(rng, frames, 1.0), id="blurred by 1 px"),
        pytest.param(lambda rng, frames: blurred(rng, frames, 2.0), id="blurred by 2 px"),
        pytest.param(off_colour, id="off colour by 0.06"),
        pytest.param(noisy, id="noise of 0.03"),
    ],
)
def test_measure_bears_what_a_model_does_to_pictures(
    cases: list[Case], drawn: list[Frames], spoil: Callable[[np.random.Generator, Frames], Frames]
) -> None:
    rng = np.random.default_rng(0)
    few = range(0, len(cases), 3)
    scores = score([cases[index] for index in few], (spoil(rng, drawn[index]) for index in few))
    assert min(fractions(scores).values()) >= READ_RIGHT


def test_measure_reads_most_of_two_objects_of_which_one_may_hide_the_other() -> None:
    cases = pair_cases()
    assert min(fractions(score(cases, draw_clips(cases))).values()) >= 0.88


def test_measure_reads_nothing_in_noise(cases: list[Case]) -> None:
    scores = score(cases[:16], draw_noise(cases[:16]))
    assert max(fractions(scores).values()) == 0


@pytest.mark.parametrize(("grey", "background"), [(10, "dark"), (245, "light"), (128, None)])
def test_measure_reads_no_object_where_there_is_none(grey: int, background: str | None) -> None:
    reading = read_clip(np.full((TRAINED_FRAMES, 128, 128, 3), grey, np.uint8))
    assert (reading.things, reading.background) == ((), background)


def test_measure_reads_nothing_in_a_field_of_colour() -> None:
    frames = np.empty((TRAINED_FRAMES, 128, 128, 3), np.uint8)
    frames[:] = (224, 26, 26)
    thing = only(frames)
    assert (thing.colour, thing.shape, thing.motion, thing.kept) == (None, None, None, False)


def test_measure_reads_nothing_in_a_blot() -> None:
    rows, columns = np.mgrid[:128, :128] - 64
    bearing, distance = np.arctan2(rows, columns), np.hypot(rows, columns)
    frames = np.full((TRAINED_FRAMES, 128, 128, 3), 20, np.uint8)
    frames[:, distance < 24 + 6 * np.cos(2 * bearing) + 5 * np.cos(3 * bearing + 1)] = (224, 26, 26)
    assert only(frames).shape is None


@pytest.mark.parametrize(
    ("told", "motion"),
    [
        pytest.param({}, "still", id="nothing changes"),
        pytest.param({"x": 64 + 3 * T}, "still", id="a few pixels"),
        pytest.param({"x": 40 + np.minimum(80 * T, 40)}, "right", id="rests after half of the clip"),
        pytest.param({"x": 80 - 30 * T, "y": 80 - 30 * T}, "up-left", id="both ways at once"),
        pytest.param({"x": 64 + 30 * np.sin(np.pi * T)}, None, id="there and back"),
        pytest.param({"x": np.where(T < 0.5, 40.0, 90.0)}, None, id="jumps"),
        pytest.param({"radius": 15 + 13 * T}, "grow", id="grows"),
        pytest.param({"radius": 25 - 13 * T}, "shrink", id="shrinks"),
        pytest.param({"radius": 20 + 10 * np.sin(np.pi * T)}, None, id="grows and shrinks"),
        pytest.param({"angle": 1.5 * T}, "spin", id="clockwise"),
        pytest.param({"angle": -1.5 * T}, "spin", id="counter-clockwise"),
        pytest.param({"angle": 1.5 * T, "shape": "star"}, "spin", id="past the next point"),
        pytest.param({"angle": 1.5 * T, "x": 44 + 40 * T}, None, id="spins on its way"),
        pytest.param({"radius": 15 + 13 * T, "y": 50 + 30 * T}, None, id="grows on its way"),
    ],
)
def test_motion_is_the_one_thing_that_changes(told: dict[str, Values], motion: str | None) -> None:
    assert only(draw(**told)).motion == motion  # type: ignore[arg-type]


def test_kept_is_one_colour_and_shape_from_first_to_last() -> None:
    frames, half = draw(), TRAINED_FRAMES // 2
    assert only(frames).kept
    others = {
        "colour": draw(colour="blue"),
        "shape": draw(shape="circle"),
        "nothing": np.full_like(frames, 128),
    }
    for name, other in others.items():
        for changed in (np.concatenate((frames[:half], other[half:])), np.concatenate((frames[:-3], other[-3:]))):
            reading = read_clip(changed)
            assert not any(thing.kept for thing in reading.things), name


def test_clip_that_dissolves_is_not_kept() -> None:
    frames = draw() / 255
    faded = as_frames(frames + (0.5 - frames) * np.clip(1.5 * T, 0, 1)[:, None, None, None])
    reading = read_clip(faded)
    assert not any(thing.kept for thing in reading.things)
    assert reading.background is None


def test_background_of_another_pattern_is_none() -> None:
    frames = draw(background="striped")
    assert read_clip(frames).background == "striped"
    assert read_clip(frames.swapaxes(1, 2)).background is None  # stripes that stand upright
    assert read_clip(np.roll(frames, 8, axis=1)).background is None  # half a stripe off
    assert read_clip(np.roll(draw(background="checkered"), 16, axis=1)).background is None  # dark where light belongs


def test_two_objects_are_read_each_by_its_colour() -> None:
    left, right = draw(x=35.0, colour="green"), draw(x=93.0, y=84 - 40 * T, colour="orange", shape="square")
    both = np.where(np.arange(128)[:, None] < 64, left, right)
    reading = read_clip(both)
    assert [replace(thing, frame_colours=(), frame_shapes=()) for thing in reading.things] == [
        ThingReading(colour="orange", shape="square", motion="up", frame_colours=(), frame_shapes=()),
        ThingReading(colour="green", shape="triangle", motion="still", frame_colours=(), frame_shapes=()),
    ]
    assert all(thing.kept for thing in reading.things)
