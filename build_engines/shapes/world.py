"""The world that `shapes` was trained on: what a scene is, and what it looks like.

A scene is one or two coloured shapes over a grey background, each with a motion of its own. Frames are 128 × 128, 16 a
second; x grows to the right, y downwards, in pixels. A motion goes on until its object meets the edge, or its largest
or smallest size, and rests there, so that a scene has a next frame however long it has lasted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from causal_forcing.runtime.geometry import frame_count

FRAME_PIXELS = 128
"""Height and width of a frame."""

TRAINED_LATENT_FRAMES = 9
TRAINED_FRAMES = frame_count(TRAINED_LATENT_FRAMES)
"""Length of a clip that the model was trained on."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.10),
    "green": (0.10, 0.68, 0.20),
    "cyan": (0.10, 0.82, 0.85),
    "blue": (0.12, 0.28, 0.95),
    "purple": (0.52, 0.15, 0.78),
    "pink": (1.00, 0.45, 0.72),
}
"""RGB in [0, 1] by name."""

SHAPES = ("circle", "square", "triangle", "star")

BACKGROUNDS = ("dark", "light", "striped", "checkered")
"""All grey, so that colour is an object's alone. Stripes lie flat; stripes and checks are 16 pixels wide."""

SIZES: dict[str, tuple[float, float]] = {"small": (13.0, 16.0), "medium": (18.0, 22.0), "large": (25.0, 29.0)}
"""Radii at the clip's start, in pixels."""

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
"""Motions that go somewhere, as the signs of (x, y)."""

MOTIONS = (*DIRECTIONS, "still", "spin", "grow", "shrink")

LARGEST_RADIUS = 44.0
SMALLEST_RADIUS = 7.0
"""Where growing and shrinking end, in pixels."""

HELD_OUT_EVERY = 8
"""One in so many (colour, shape, motion) is never seen in training."""

_EDGE = 3.0  # pixels left free between an object and the frame's edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object of a scene, by its names in the tables above."""

    colour: str
    """One of `COLOURS`."""
    shape: str
    """One of `SHAPES`."""
    motion: str
    """One of `MOTIONS`."""
    size: str = "medium"
    """One of `SIZES`."""

    @property
    def held_out(self) -> bool:
        """Whether training never shows this colour, shape and motion together: one colour of each shape and motion."""
        place = list(COLOURS).index(self.colour) + 3 * SHAPES.index(self.shape) + 5 * MOTIONS.index(self.motion)
        return place % HELD_OUT_EVERY == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a caption says."""

    things: tuple[Thing, ...]
    """One or two objects, of different colours; a later one lies over an earlier one."""
    background: str
    """One of `BACKGROUNDS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracks:
    """Scenes with everything that captions leave open: where, how fast, how large. B scenes, O objects, T frames."""

    x: npt.NDArray[np.float32]
    """[B, O, T], centres."""
    y: npt.NDArray[np.float32]
    """[B, O, T], centres."""
    radius: npt.NDArray[np.float32]
    """[B, O, T]; 0 where a scene has no such object."""
    angle: npt.NDArray[np.float32]
    """[B, O, T], radians, clockwise; 0 is upright."""
    shape: npt.NDArray[np.int64]
    """[B, O], index in `SHAPES`."""
    colour: npt.NDArray[np.float32]
    """[B, O, 3], RGB in [0, 1]."""
    background: npt.NDArray[np.int64]
    """[B], index in `BACKGROUNDS`."""
    shade: npt.NDArray[np.float32]
    """[B], added to the background's grey."""

    def part(self, rows: slice | npt.NDArray[np.int64], frames: slice) -> Tracks:
        """Return some frames of some scenes."""
        return Tracks(
            x=self.x[rows][:, :, frames],
            y=self.y[rows][:, :, frames],
            radius=self.radius[rows][:, :, frames],
            angle=self.angle[rows][:, :, frames],
            shape=self.shape[rows],
            colour=self.colour[rows],
            background=self.background[rows],
            shade=self.shade[rows],
        )


def spins_visibly(thing: Thing) -> bool:
    """Return whether a spin of the object could be seen; a circle's could not, and no scene has one."""
    return not (thing.shape == "circle" and thing.motion == "spin")


def all_things(*, held_out: bool) -> list[Thing]:
    """Return every (colour, shape, motion) of medium size that is held out, or every one that is not."""
    things = [
        Thing(colour=colour, shape=shape, motion=motion) for motion in MOTIONS for shape in SHAPES for colour in COLOURS
    ]
    return [thing for thing in things if thing.held_out == held_out and spins_visibly(thing)]


def draw_scene(rng: np.random.Generator, *, pair_probability: float = 0.2) -> Scene:
    """Draw a scene for training: nothing that is held out; sometimes two objects, none of them large then."""
    count = 2 if rng.random() < pair_probability else 1
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
            motion=str(rng.choice(MOTIONS)),
            size=str(rng.choice(list(SIZES) if count == 1 else ["small", "medium"])),
        )
        if not thing.held_out and spins_visibly(thing) and all(thing.colour != other.colour for other in things):
            things.append(thing)
    return Scene(things=tuple(things), background=str(rng.choice(BACKGROUNDS)))


def draw_tracks(rng: np.random.Generator, scenes: Sequence[Scene], *, frames: int = TRAINED_FRAMES) -> Tracks:
    """Draw what the captions of scenes leave open, and follow it for some frames."""
    objects = max(len(scene.things) for scene in scenes)
    shape = (len(scenes), objects, frames)
    x, y, angle = (np.zeros(shape, np.float32) for _ in range(3))
    radius = np.zeros(shape, np.float32)
    colour = np.zeros((*shape[:2], 3), np.float32)
    kind = np.zeros(shape[:2], np.int64)
    for row, scene in enumerate(scenes):
        tracks = _draw_apart(rng, scene, frames)
        for column, (thing, track) in enumerate(zip(scene.things, tracks, strict=True)):
            x[row, column], y[row, column], radius[row, column], angle[row, column] = track
            colour[row, column] = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-0.03, 0.03, 3), 0, 1)
            kind[row, column] = SHAPES.index(thing.shape)
    return Tracks(
        x=x,
        y=y,
        radius=radius,
        angle=angle,
        shape=kind,
        colour=colour,
        background=np.array([BACKGROUNDS.index(scene.background) for scene in scenes]),
        shade=rng.uniform(-0.03, 0.03, len(scenes)).astype(np.float32),
    )


def render(tracks: Tracks, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw frames.

    Returns:
        [B, T, 3, 128, 128] fp32 in [0, 1], on the device; edges are smooth over one pixel.
    """
    frames = tracks.x.shape[2]
    steps = torch.arange(FRAME_PIXELS, device=device, dtype=torch.float32) + 0.5
    rows, columns = steps[:, None], steps[None, :]
    grey = _backgrounds(device)[torch.from_numpy(tracks.background).to(device)]
    canvas = (grey + torch.from_numpy(tracks.shade).to(device)[:, None, None])[:, None, None]
    canvas = canvas.expand(-1, frames, 3, -1, -1)
    for column in range(tracks.x.shape[1]):
        x, y, radius, angle = (
            torch.from_numpy(array[:, column]).to(device)[..., None, None]
            for array in (tracks.x, tracks.y, tracks.radius, tracks.angle)
        )
        kind = torch.from_numpy(tracks.shape[:, column]).to(device).reshape(-1, 1, 1, 1)
        distance = _signed_distance(columns - x, rows - y, radius, angle, kind)
        coverage = (0.5 - distance).clamp(0, 1) * (radius > 0)
        colour = torch.from_numpy(tracks.colour[:, column]).to(device).reshape(-1, 1, 3, 1, 1)
        canvas = torch.lerp(canvas, colour.expand_as(canvas), coverage[:, :, None])
    return canvas


def _backgrounds(device: torch.device | str) -> torch.Tensor:
    """Return the grey of every background, [4, 128, 128]."""
    cell = (torch.arange(FRAME_PIXELS, device=device) // 16) % 2
    flat = torch.ones(FRAME_PIXELS, FRAME_PIXELS, device=device)
    stripes = cell[:, None].expand_as(flat).float()
    checks = (cell[:, None] ^ cell[None, :]).float()
    return torch.stack((0.07 * flat, 0.93 * flat, 0.35 + 0.3 * stripes, 0.35 + 0.3 * checks))


def _signed_distance(
    dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor, angle: torch.Tensor, kind: torch.Tensor
) -> torch.Tensor:
    """Return the distance of pixels from an outline, negative inside; all shapes have about the same area.

    A shape is a polygon with n points: its plane is folded into the wedge of half a point, where the outline is one
    straight line. Outside of a corner the distance comes out too small, by less than a pixel where edges are smoothed.
    """
    length = torch.hypot(dx, dy)
    bearing = torch.atan2(dx, -dy) - angle  # clockwise from upright
    outline = length - radius
    square = _wedge(length, bearing + math.pi / 4, 4, 1.25 * radius, 1.25 * radius * math.cos(math.pi / 4))
    triangle = _wedge(length, bearing, 3, 1.45 * radius, 1.45 * radius * math.cos(math.pi / 3))
    star = _wedge(length, bearing, 5, 1.50 * radius, 0.72 * radius)
    for index, distance in enumerate((square, triangle, star), start=1):
        outline = torch.where(kind == index, distance, outline)
    return outline


def _wedge(
    length: torch.Tensor, bearing: torch.Tensor, points: int, outer: torch.Tensor, inner: torch.Tensor
) -> torch.Tensor:
    """Return the distance from the line between a point's tip, at `outer`, and the notch beside it, at `inner`."""
    half = math.pi / points
    folded = (torch.remainder(bearing + half, 2 * half) - half).abs()
    along, across = length * folded.cos(), length * folded.sin()
    notch_along, notch_across = inner * math.cos(half), inner * math.sin(half)
    edge_along, edge_across = notch_along - outer, notch_across
    # A circle's radius of 0 would make the edge one of no length.
    edge = torch.hypot(edge_along, edge_across).clamp_min(1e-6)
    return (edge_along * -across + edge_across * (along - outer)) / edge


Track = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _draw_apart(rng: np.random.Generator, scene: Scene, frames: int) -> list[Track]:
    """Draw tracks of a scene's objects; of several draws take the one whose objects keep the most apart."""
    best: list[Track] = []
    best_gap = -math.inf
    for _ in range(1 if len(scene.things) == 1 else 16):
        tracks = [_draw_track(rng, thing, frames) for thing in scene.things]
        gap = math.inf
        if len(tracks) == 2:
            (x, y, r, _), (x2, y2, r2, _) = tracks
            gap = float((np.hypot(x - x2, y - y2) - 1.3 * (r + r2)).min())
        if gap > best_gap:
            best, best_gap = tracks, gap
    return best


def _draw_track(rng: np.random.Generator, thing: Thing, frames: int) -> Track:
    """Draw one object's way."""
    t = np.arange(frames, dtype=np.float64)
    last = TRAINED_FRAMES - 1
    r = rng.uniform(*SIZES[thing.size])
    radius = np.full(frames, r)
    if thing.motion == "grow":
        radius = np.minimum(r * (1 + rng.uniform(0.7, 1.2) * t / last), LARGEST_RADIUS)
    elif thing.motion == "shrink":
        radius = np.maximum(r * (1 - rng.uniform(0.45, 0.6) * t / last), SMALLEST_RADIUS)
    reach = 1.3 * (min(2.2 * r, LARGEST_RADIUS) if thing.motion == "grow" else r)
    low, high = reach + _EDGE, FRAME_PIXELS - reach - _EDGE
    if low > high:
        low = high = FRAME_PIXELS / 2
    x, y = np.full(frames, rng.uniform(low, high)), np.full(frames, rng.uniform(low, high))
    angle = np.zeros(frames)
    if thing.motion in DIRECTIONS:
        signs = DIRECTIONS[thing.motion]
        room = high - low
        travel = room * rng.uniform(0.5, 0.95)
        starts = [rng.uniform(low, high - travel) for _ in signs]
        # Some arrive before the clip ends and rest, some would go on.
        step = travel / last * rng.uniform(0.8, 1.4)
        rooms = [high - start for start, sign in zip(starts, signs, strict=True) if sign]
        way = np.minimum(step * t, min(rooms))
        places = []
        for start, sign in zip(starts, signs, strict=True):
            place = start + way if sign else np.full(frames, rng.uniform(low, high))
            places.append(place if sign >= 0 else FRAME_PIXELS - place)
        x, y = places
    elif thing.motion == "spin":
        angle = math.radians(rng.uniform(2.5, 4.5)) * t
    return x, y, radius, angle
