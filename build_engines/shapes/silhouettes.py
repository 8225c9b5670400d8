"""Where an object is in each frame, and what its outline is: colour segmentation and angular harmonics.

Backgrounds are grey, so an object is what has colour. Mixing a colour with grey, as a soft edge does, keeps its hue and
scales its chroma: the outline lies where the chroma is half of the object's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from causal_forcing.build_engines.shapes.world import COLOURS, FRAME_PIXELS

HUES = tuple(COLOURS)
"""Names of the palette's hues, in the order of the indices below."""

NO_HUE = -1
"""Index of a pixel without colour."""

CORNERS = {"triangle": 3, "square": 4, "star": 5}
"""Corners of the shapes that have any."""

_COLOURED = 0.17
"""Least chroma of a pixel that has colour; pink's is 0.39, and white balance 0.06 off gives grey 0.1."""
_OFF_COLOUR = 0.35
"""Largest RGB distance from a palette colour; its two nearest colours lie that far apart."""
_AREAS = (60, 0.45 * FRAME_PIXELS**2)
"""Least and largest area of an object in pixels: the world's smallest has 130, its largest 6150."""
_STRAY = 1.7
"""Radii, of the circle of equal area, beyond which a pixel is none of the object's; a triangle's tip lies at 1.56."""
_SHARP = {"triangle": 0.75, "square": 0.43, "star": 0.73}
"""Magnitude of the harmonic that a shape's corners make, where its outline is sharp."""
_ROUND = 0.2
"""Largest magnitude of a harmonic that corners would make, of a circle: just below that of the bluntest square."""
_OVAL = 0.25
"""Largest magnitude of a circle's second harmonic: 18 % longer than wide."""

_ACROSS = np.array([(2**-0.5, 6**-0.5), (-(2**-0.5), 6**-0.5), (0, -2 * 6**-0.5)], np.float32)
"""Two axes across the grey axis of RGB, as columns."""

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]


Scalar = TypeVar("Scalar", np.float32, np.complex64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silhouettes:
    """One object in each of T frames; numbers of frames without a clean object mean nothing."""

    clean: Flags
    """[T], whether the frame shows one solid object of believable size."""
    x: Floats
    """[T], centre of mass in pixels."""
    y: Floats
    """[T], centre of mass in pixels."""
    radius: Floats
    """[T], radius of the circle of equal area, in pixels."""
    phases: dict[str, Floats]
    """By shape with n corners: [T], phase of the n-th harmonic, n times the angle of the shape, in radians."""
    colours: tuple[str | None, ...]
    """[T], colour, or None where it is mixed or none of the palette's."""
    shapes: tuple[str | None, ...]
    """[T], shape, or None where the outline is none of the world's."""


def chroma_and_hue(pixels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return how coloured every pixel is, and the palette hue that is nearest.

    Args:
        pixels: [T, H, W, 3], RGB in [0, 1].

    Returns:
        [T, H, W] distance from grey, and [T, H, W] index in `HUES`, or `NO_HUE`.
    """
    plane = box_mean(_opponent(pixels), 3)
    chroma = np.abs(plane)
    hue = np.full(chroma.shape, NO_HUE)
    coloured = chroma > _COLOURED
    palette = np.angle(_opponent(np.array(list(COLOURS.values()), np.float32)))
    turns = np.angle(plane[coloured])[:, None] - palette
    hue[coloured] = np.cos(turns).argmax(1)
    return chroma, hue


def solid_hues(hue: npt.NDArray[np.int64]) -> Flags:
    """Return [T, hues], whether a frame has a patch of a hue that is solid, as edges and speckles are not."""
    solid = np.zeros((len(hue), len(HUES)), bool)
    for index in range(len(HUES)):
        mask = hue == index
        some = mask.sum((1, 2)) >= _AREAS[0] / 2
        if some.any():
            solid[some, index] = box_mean(mask[some].astype(np.float32), 5).max((1, 2)) > 0.9
    return solid


def trace(pixels: npt.NDArray[np.float32], chroma: npt.NDArray[np.float32], mask: Flags) -> Silhouettes:
    """Measure an object in every frame.

    Args:
        pixels: [T, H, W, 3], RGB in [0, 1].
        chroma: [T, H, W], from `chroma_and_hue`.
        mask: [T, H, W], pixels that may be the object's.
    """
    count = len(mask)
    peak = np.array([np.percentile(c[m], 90) if m.any() else 1.0 for c, m in zip(chroma, mask, strict=True)])
    t, rows, columns = np.nonzero(mask & (chroma > 0.5 * peak[:, None, None]))
    found = np.bincount(t, minlength=count)
    for _ in range(2):  # the second time without strays, which had shifted the centre
        area = np.bincount(t, minlength=count)
        x = np.bincount(t, columns + 0.5, count) / np.maximum(area, 1)
        y = np.bincount(t, rows + 0.5, count) / np.maximum(area, 1)
        radius = np.sqrt(np.maximum(area, 1) / np.pi)
        own = np.hypot(columns + 0.5 - x[t], rows + 0.5 - y[t]) < _STRAY * radius[t]
        t, rows, columns = t[own], rows[own], columns[own]
    offset = (columns + 0.5 - x[t]) + 1j * (rows + 0.5 - y[t])
    inner = np.bincount(t, np.abs(offset) < 0.6 * radius[t], count) / (np.pi * (0.6 * radius) ** 2)
    area = np.bincount(t, minlength=count)
    clean = (area > _AREAS[0]) & (area < _AREAS[1]) & (found - area < 0.08 * area) & (inner > 0.9)
    harmonics = _harmonics(t, offset, radius, count)
    return Silhouettes(
        clean=clean,
        x=x,
        y=y,
        radius=radius,
        phases={shape: np.angle(harmonics[n]) for shape, n in CORNERS.items()},
        colours=_colours(pixels[t, rows, columns], t, clean),
        shapes=tuple(
            _shape({n: abs(c[frame]) for n, c in harmonics.items()}, radius[frame]) if clean[frame] else None
            for frame in range(count)
        ),
    )


def box_mean(image: npt.NDArray[Scalar], width: int) -> npt.NDArray[Scalar]:
    """Return the mean over the square of an odd width around every pixel of [T, H, W]; the edge is repeated."""
    reach, (rows, columns) = width // 2, image.shape[1:]
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    down, mean = np.zeros_like(padded[:, :rows]), np.zeros_like(image)
    for k in range(width):
        down += padded[:, k : k + rows]
    for k in range(width):
        mean += down[:, :, k : k + columns]
    mean /= width**2
    return mean


def _opponent(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.complex64]:
    """Return [...] the part of RGB [..., 3] that is not grey, as a number of the plane across the grey axis."""
    across: npt.NDArray[np.float32] = pixels @ _ACROSS
    return across.view(np.complex64)[..., 0]


def _harmonics(
    t: npt.NDArray[np.int64], offset: npt.NDArray[np.complex128], radius: Floats, count: int
) -> dict[int, npt.NDArray[np.complex128]]:
    """Return the harmonics 2 to 5 of masks about their centres, [T] each: 0 for a circle, at most 1.

    The weight of a pixel grows with the fourth power of its distance, so that the outline counts and size does not.
    """
    distance = np.abs(offset)
    turn = offset / np.maximum(distance, 1e-6)
    weight = (distance / radius[t]) ** 4
    total = np.maximum(np.bincount(t, weight, count), 1e-6)
    harmonics: dict[int, npt.NDArray[np.complex128]] = {}
    for n in range(2, 6):
        part = weight * turn**n
        harmonics[n] = np.zeros(count, np.complex128)
        harmonics[n].real = np.bincount(t, part.real, count) / total
        harmonics[n].imag = np.bincount(t, part.imag, count) / total
    return harmonics


def _shape(magnitudes: dict[int, float], radius: float) -> str | None:
    """Return the shape of an outline by its harmonics; small ones may be blunter."""
    if max(magnitudes[n] for n in CORNERS.values()) < _ROUND:
        return "circle" if magnitudes[2] < _OVAL else None
    first, second = sorted(magnitudes, key=lambda n: -magnitudes[n])[:2]
    blunt = 0.5 if radius > 9 else 0.3
    for shape, n in CORNERS.items():
        if n == first and magnitudes[n] > blunt * _SHARP[shape] and magnitudes[second] < 0.5 * magnitudes[n]:
            return shape
    return None


def _colours(own: npt.NDArray[np.float32], t: npt.NDArray[np.int64], clean: Flags) -> tuple[str | None, ...]:
    """Return the colour of each frame's object: the hue of most of its pixels, if their median is that colour."""
    palette = np.array(list(COLOURS.values()))
    hues = np.cos(np.angle(_opponent(own))[:, None] - np.angle(_opponent(palette.astype(np.float32)))).argmax(1)
    colours: list[str | None] = []
    for frame, usable in enumerate(clean):
        colour = None
        if usable:
            votes = np.bincount(hues[t == frame], minlength=len(HUES))
            hue = int(votes.argmax())
            median = np.median(own[(t == frame) & (hues == hue)], 0)
            if votes[hue] > 0.8 * votes.sum() and np.linalg.norm(median - palette[hue]) < _OFF_COLOUR:
                colour = HUES[hue]
        colours.append(colour)
    return tuple(colours)
