"""The world: reproducible, without what is held out, and moving as its captions say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from causal_forcing.build_engines.shapes.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    plain_caption,
    vocabulary,
    write_caption,
)
from causal_forcing.build_engines.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FRAME_PIXELS,
    LARGEST_RADIUS,
    MOTIONS,
    SHAPES,
    SIZES,
    SMALLEST_RADIUS,
    Scene,
    Thing,
    Tracks,
    all_things,
    draw_scene,
    draw_tracks,
    render,
    spins_visibly,
)

HELD_OUT = all_things(held_out=True)
SEEN = all_things(held_out=False)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(1000)]


@pytest.fixture(scope="module")
def tracks(scenes: list[Scene]) -> Tracks:
    return draw_tracks(np.random.default_rng(1), scenes)


def test_world_of_a_seed_is_always_the_same(scenes: list[Scene]) -> None:
    def draw(seed: int) -> tuple[Scene, str, bytes]:
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        return scene, write_caption(rng, scene), render(draw_tracks(rng, [scene], frames=3)).numpy().tobytes()

    assert draw(3) == draw(3) != draw(4)


def test_held_out_is_one_colour_of_every_shape_and_motion() -> None:
    assert {(thing.shape, thing.motion) for thing in HELD_OUT} == {
        (shape, motion) for shape in SHAPES for motion in MOTIONS
    } - {("circle", "spin")}
    assert len(HELD_OUT) == 47
    assert len(HELD_OUT) + len(SEEN) == (len(SHAPES) * len(MOTIONS) - 1) * len(COLOURS)


def test_held_out_is_never_drawn_for_training(scenes: list[Scene]) -> None:
    drawn = [thing for scene in scenes for thing in scene.things]
    assert not any(thing.held_out or not spins_visibly(thing) for thing in drawn)
    assert {thing.colour for thing in drawn} == set(COLOURS)
    assert {thing.motion for thing in drawn} == set(MOTIONS)
    assert 150 < sum(len(scene.things) == 2 for scene in scenes) < 250
    assert all(len({thing.colour for thing in scene.things}) == len(scene.things) for scene in scenes)


def test_objects_stay_inside_the_frame(tracks: Tracks) -> None:
    # A circle of 1.3 radii: the tips of triangles and stars reach a little beyond.
    for centre in (tracks.x, tracks.y):
        there = tracks.radius > 0
        assert (centre - 1.3 * tracks.radius)[there].min() >= 0
        assert (centre + 1.3 * tracks.radius)[there].max() <= FRAME_PIXELS
    assert tracks.radius[there].min() >= SMALLEST_RADIUS
    assert tracks.radius.max() <= LARGEST_RADIUS


def test_objects_begin_as_large_as_they_are_called(scenes: list[Scene], tracks: Tracks) -> None:
    for scene, radius in zip(scenes, tracks.radius[:, :, 0], strict=True):
        for thing, r in zip(scene.things, radius, strict=False):
            low, high = SIZES[thing.size]
            assert low <= r <= high


def test_motions_do_what_they_say(scenes: list[Scene], tracks: Tracks) -> None:
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            x, y, radius, angle = (getattr(tracks, name)[row, column] for name in ("x", "y", "radius", "angle"))
            way = np.array([x[-1] - x[0], y[-1] - y[0]])
            signs = np.array(DIRECTIONS.get(thing.motion, (0, 0)))
            assert (np.sign(way) == signs).all()
            assert not signs.any() or np.abs(way).max() > 18
            assert np.sign(radius[-1] - radius[0]) == {"grow": 1, "shrink": -1}.get(thing.motion, 0)
            assert (angle[-1] > np.radians(75)) == (thing.motion == "spin")


def test_motions_end_in_rest_but_for_spinning() -> None:
    scenes = [
        Scene(things=(Thing(colour="red", shape="star", motion=motion),), background="dark") for motion in MOTIONS
    ]
    tracks = draw_tracks(np.random.default_rng(5), scenes, frames=200)
    for name in ("x", "y", "radius", "angle"):
        values = getattr(tracks, name)[:, 0]
        resting = values[:, -50] == values[:, -1]
        assert resting.tolist() == [name != "angle" or motion != "spin" for motion in MOTIONS]


def test_frames_are_grey_but_for_the_object() -> None:
    scenes = [
        Scene(things=(Thing(colour="purple", shape="star", motion="still"),), background=background)
        for background in BACKGROUNDS
    ]
    frames = render(draw_tracks(np.random.default_rng(0), scenes, frames=1))
    assert frames.shape == (len(BACKGROUNDS), 1, 3, FRAME_PIXELS, FRAME_PIXELS)
    assert 0 <= float(frames.min()) <= float(frames.max()) <= 1
    chroma = frames.amax(2) - frames.amin(2)
    assert 0.02 < float((chroma > 0.1).float().mean()) < 0.2


def test_every_word_of_captions_is_in_the_vocabulary(scenes: list[Scene]) -> None:
    words, rng = set(vocabulary()), np.random.default_rng(2)
    for scene in scenes:
        for caption in (write_caption(rng, scene), plain_caption(scene)):
            assert set(re.findall(r"[a-z0-9]+|[^\sa-z0-9]", caption)) <= words


def test_captions_name_everything_that_is_asked_for(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(3)
    for scene in scenes[:300]:
        caption = write_caption(rng, scene)
        assert any(words in caption for words in BACKGROUND_WORDS[scene.background])
        for thing in scene.things:
            assert any(word in caption for word in COLOUR_WORDS[thing.colour])
            assert any(word in caption for word in SHAPE_WORDS[thing.shape])
            assert any(word in caption for word in SIZE_WORDS[thing.size])


def test_plain_caption_is_the_plainest() -> None:
    thing = Thing(colour="red", shape="star", motion="spin", size="large")
    assert plain_caption(Scene(things=(thing,), background="dark")) == "a large red star spins over a dark background"
