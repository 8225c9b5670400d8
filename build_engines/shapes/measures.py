"""Frames to what they show: colour, shape and motion of every object, and the background.

Classical measures, without anything learnt, so that they cannot share a model's mistakes. What is not clearly one of
the world's names is read as None.
"""

from __future__ import annotations

import cmath
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from causal_forcing.build_engines.shapes.silhouettes import (
    CORNERS,
    NO_HUE,
    Flags,
    Floats32,
    Silhouettes,
    box_mean,
    chroma_and_hue,
    solid_hues,
    trace,
)
from causal_forcing.build_engines.shapes.world import DIRECTIONS, FRAME_PIXELS

_MOST = 0.75
"""Share of a clip's frames that must agree on what the clip shows."""
_LEGIBLE = 1 / 3
"""Share of a clip's frames in which the outline must be one of the world's: motion may blur the others."""
_END_FRAMES = 4
"""Frames of a clip's beginning, or end: what one latent frame holds."""

_TOUCH = 3
"""Pixels beside another object from which on two objects touch; single ones may be noise."""

_MOVED = 9.0
_GREW = math.log(1.25)
_TURNED = math.radians(35)
"""Least way in pixels, growth as a logarithm, and turn of a motion: half of the world's smallest ones."""
_RESTING = 0.66
"""Largest fraction of these that counts as standing still."""
_JUMP = 12.0
"""Pixels from one frame to the next that are no motion any more; the world's fastest object goes 5.2."""

_PALEST = 0.75
_DARKEST = 0.25
"""Grey of a light background at least, of a dark one at most."""
_CONTRAST = 0.08
"""Least amplitude of stripes or checks: half of the world's."""
_ROUGH = 0.1
"""Largest deviation of a background from its pattern, RMS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThingReading:
    """What frames show of one object; None is nothing that the world knows."""

    colour: str | None
    """Colour of most frames."""
    shape: str | None
    """Shape of most frames that show any."""
    motion: str | None
    """Motion of the whole clip."""
    frame_colours: tuple[str | None, ...]
    """Colour in each frame; where two objects touch, frames are left out."""
    frame_shapes: tuple[str | None, ...]
    """Shape in each of these frames."""

    @property
    def kept(self) -> bool:
        """Whether the object has one colour and one shape, from its first frames to its last."""
        if self.colour is None or self.shape is None:
            return False
        for part in (slice(None), slice(_END_FRAMES), slice(-_END_FRAMES, None)):
            colours, outlines = self.frame_colours[part], [shape for shape in self.frame_shapes[part] if shape]
            if colours.count(self.colour) < _MOST * len(colours):
                return False
            if not outlines or outlines.count(self.shape) < _MOST * len(outlines):
                return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the frames of a clip show."""

    things: tuple[ThingReading, ...]
    """No, one or two objects; two in the order of `COLOURS`."""
    background: str | None
    """Background of most frames."""


def read_clip(frames: npt.NDArray[np.uint8]) -> Reading:
    """Read a clip.

    Args:
        frames: [T, 128, 128, 3], RGB.
    """
    pixels = frames.astype(np.float32) / np.float32(255)
    chroma, hue = chroma_and_hue(pixels)
    solid = solid_hues(hue)
    objects = int(np.bincount(solid.sum(1)).argmax())
    masks: list[Flags] = []
    when = np.arange(len(frames))
    if objects == 1:
        masks = [hue != NO_HUE]
    elif objects == 2:
        masks = [hue == index for index in sorted(np.argsort(-solid.sum(0), kind="stable")[:2])]
        apart = _apart(*masks)
        when = when[apart] if apart.sum() >= 2 * _END_FRAMES else when
    return Reading(
        things=tuple(_read_thing(trace(pixels[when], chroma[when], mask[when]), when) for mask in masks),
        background=_majority(_read_backgrounds(pixels.mean(-1), hue != NO_HUE)),
    )


def _apart(first: Flags, second: Flags) -> Flags:
    """Return [T], whether two objects are apart: where they touch, one may hide a part of the other."""
    near = box_mean(first.astype(np.float32), 5) > 0.5 / 25
    return np.asarray((near & second).sum((1, 2)) < _TOUCH)


def _read_thing(silhouettes: Silhouettes, when: npt.NDArray[np.int64]) -> ThingReading:
    """Read an object from some frames, [T], and their places in the clip."""
    legible = [shape for shape in silhouettes.shapes if shape]
    shape = _majority(legible) if len(legible) >= _LEGIBLE * len(when) else None
    return ThingReading(
        colour=_majority(silhouettes.colours),
        shape=shape,
        motion=_read_motion(silhouettes, when, shape),
        frame_colours=silhouettes.colours,
        frame_shapes=silhouettes.shapes,
    )


def _majority(names: Sequence[str | None]) -> str | None:
    """Return the name that most agree on, None among them."""
    name, votes = Counter(names).most_common(1)[0]
    return name if votes >= _MOST * len(names) else None


def _read_motion(silhouettes: Silhouettes, when: npt.NDArray[np.int64], shape: str | None) -> str | None:
    """Return what an object does over the whole clip: the one way in which it changes, or `still`."""
    clean = silhouettes.clean
    if clean.sum() < max(_MOST * len(clean), 2 * _END_FRAMES):
        return None
    x, y, radius = (values[clean] for values in (silhouettes.x, silhouettes.y, silhouettes.radius))
    if (np.hypot(np.diff(x), np.diff(y)) / np.diff(when[clean])).max() > _JUMP:
        return None
    turn = np.zeros(len(x))
    if shape in CORNERS:
        turn = np.unwrap(silhouettes.phases[shape][clean]) / CORNERS[shape]
    changes = {
        "goes": _change((x + 1j * y) / _MOVED),
        "grows": _change(np.log(radius) / _GREW),
        "turns": _change(turn / _TURNED),
    }
    sizes = {name: abs(change) for name, change in changes.items()}
    other, most = sorted(sizes, key=lambda name: sizes[name])[-2:]
    if sizes[most] < _RESTING:
        return "still"
    if sizes[most] < 1 or sizes[most] == math.inf or sizes[other] > max(1, sizes[most] / 2):
        return None
    if most == "goes":
        return _direction(changes["goes"])
    if most == "turns":
        return "spin"
    return "grow" if changes["grows"].real > 0 else "shrink"


def _change(values: npt.NDArray[np.generic]) -> complex:
    """Return how far values get from the clip's beginning to its end; infinity if they turn back on the way."""
    begin, end = values[:_END_FRAMES].mean(), values[-_END_FRAMES:].mean()
    farthest = float(np.abs(values - begin).max())
    return complex(math.inf) if farthest > max(1, 1.5 * abs(end - begin)) else complex(end - begin)


def _direction(way: complex) -> str:
    """Return the direction next to a way."""
    turns = {name: abs(cmath.phase(way / complex(*signs))) for name, signs in DIRECTIONS.items()}
    return min(turns, key=lambda name: turns[name])


def _read_backgrounds(grey: Floats32, coloured: Flags) -> tuple[str | None, ...]:
    """Read the background of every frame from what lies around its coloured pixels: a fit of patterns.

    Args:
        grey: [T, H, W] in [0, 1].
        coloured: [T, H, W], pixels that are an object's.
    """
    grey, coloured = grey[:, ::2, ::2], coloured[:, ::2, ::2]  # every other pixel is enough
    cell = np.arange(0, FRAME_PIXELS, 2) // 16 % 2 * 2.0 - 1
    flat = np.ones(grey.shape[1:])
    # Stripes that stand upright are not in the world; they are fitted so that nothing else is taken for them.
    patterns = np.stack((flat, cell[:, None] * flat, -cell[:, None] * cell, cell * flat)).reshape(4, -1)
    free = (box_mean(coloured.astype(np.float32), 5) < 0.01).reshape(len(grey), -1).astype(np.float64)
    seen = grey.reshape(len(grey), -1) * free
    pixels = free.sum(1)
    products = (free @ (patterns[:, None] * patterns).reshape(16, -1).T).reshape(-1, 4, 4) + 1e-3 * np.eye(4)
    along = seen @ patterns.T
    levels = np.linalg.solve(products, along[..., None])[..., 0]
    rough = np.sqrt(np.maximum((seen**2).sum(1) - (levels * along).sum(1), 0) / np.maximum(pixels, 1))
    known = (pixels > 0.2 * flat.size) & (rough < _ROUGH)
    return tuple(_background(*level) if usable else None for level, usable in zip(levels, known, strict=True))


def _background(mean: float, stripes: float, checks: float, upright: float) -> str | None:
    """Return the background of a mean grey and the amplitudes of its patterns."""
    amplitudes = {"striped": stripes, "checkered": checks, None: upright}
    second, first = sorted(amplitudes, key=lambda name: abs(amplitudes[name]))[-2:]
    if abs(amplitudes[first]) < _CONTRAST / 2:
        return "light" if mean > _PALEST else "dark" if mean < _DARKEST else None
    if amplitudes[first] < _CONTRAST or abs(amplitudes[second]) > amplitudes[first] / 2:
        return None
    return first
