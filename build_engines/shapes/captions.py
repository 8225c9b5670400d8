"""Captions of scenes: many ways to say the same, and the list of all words, from which the tokenizer is made."""

from __future__ import annotations

import re

import numpy as np

from causal_forcing.build_engines.shapes.world import Scene, Thing

COLOUR_WORDS = {
    "red": ("red", "red", "scarlet", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "golden"),
    "green": ("green",),
    "cyan": ("cyan", "cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "magenta"),
}

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
}

SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("", "", "", "medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}

GOING = (
    ("drifts", "drifting"),
    ("moves", "moving"),
    ("glides", "gliding"),
    ("slides", "sliding"),
    ("floats", "floating"),
    ("travels", "travelling"),
    ("goes", "going"),
)

DIRECTION_WORDS = {
    "left": ("left", "to the left", "leftward", "towards the left"),
    "right": ("right", "to the right", "rightward", "towards the right"),
    "up": ("up", "upward", "upwards", "to the top", "towards the top"),
    "down": ("down", "downward", "downwards", "to the bottom", "towards the bottom"),
}

STAYING = {
    "still": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("does not move", "not moving"),
        ("rests", "resting"),
        ("sits motionless", "sitting motionless"),
        ("stays in place", "staying in place"),
    ),
    "spin": (
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("turns", "turning"),
        ("turns around", "turning around"),
        ("spins in place", "spinning in place"),
        ("twirls", "twirling"),
    ),
    "grow": (
        ("grows", "growing"),
        ("expands", "expanding"),
        ("gets bigger", "getting bigger"),
        ("grows larger", "growing larger"),
        ("swells", "swelling"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("contracts", "contracting"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
        ("dwindles", "dwindling"),
    ),
}

BACKGROUND_WORDS = {
    "dark": ("over a dark background", "on a dark background", "on a black background", "against black", "in the dark"),
    "light": (
        "over a light background",
        "on a white background",
        "on a bright background",
        "against white",
        "over a pale background",
    ),
    "striped": ("over a striped background", "on a striped background", "over stripes", "against grey stripes"),
    "checkered": (
        "over a checkered background",
        "on a checkered background",
        "over a checkerboard",
        "on a chessboard",
        "against grey checks",
    ),
}

_OPENINGS = ("a video of", "a clip of", "an animation of", "we see")
_WORD = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")


def write_caption(rng: np.random.Generator, scene: Scene) -> str:
    """Say a scene in one of its many ways."""
    background = _pick(rng, BACKGROUND_WORDS[scene.background])
    style = int(rng.integers(5))
    if style == 4:
        told = " and ".join(f"{_object(rng, thing)} {_motion(rng, thing, gerund=True)}" for thing in scene.things)
        return f"{_pick(rng, _OPENINGS)} {told} {background}"
    told = " and ".join(
        f"{_object(rng, thing)} {'that ' if style == 3 else ''}{_motion(rng, thing, gerund=False)}"
        for thing in scene.things
    )
    return f"{background}, {told}" if style == 2 else f"{told} {background}"


def plain_caption(scene: Scene) -> str:
    """Say a scene in the first words of the tables: what examples and evaluation use."""
    told = " and ".join(
        f"{_noun(SIZE_WORDS[thing.size][0], COLOUR_WORDS[thing.colour][0], SHAPE_WORDS[thing.shape][0])} "
        f"{_motions(thing)[0][0]}"
        for thing in scene.things
    )
    return f"{told} {BACKGROUND_WORDS[scene.background][0]}"


def vocabulary() -> list[str]:
    """Return every word and mark that a caption can hold, sorted."""
    texts = ["a an and that , . of the to", *_OPENINGS]
    for table in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, BACKGROUND_WORDS, DIRECTION_WORDS):
        texts += [text for choices in table.values() for text in choices]
    texts += [text for pair in GOING for text in pair]
    texts += [text for pairs in STAYING.values() for pair in pairs for text in pair]
    texts += ["diagonally upper lower corner background grey gray is it in on over its own"]
    return sorted({word for text in texts for word in _WORD.findall(text)})


def _object(rng: np.random.Generator, thing: Thing) -> str:
    return _noun(
        _pick(rng, SIZE_WORDS[thing.size]),
        _pick(rng, COLOUR_WORDS[thing.colour]),
        _pick(rng, SHAPE_WORDS[thing.shape]),
    )


def _noun(*words: str) -> str:
    noun = " ".join(word for word in words if word)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _motion(rng: np.random.Generator, thing: Thing, *, gerund: bool) -> str:
    return _pick_pair(rng, _motions(thing))[gerund]


def _motions(thing: Thing) -> tuple[tuple[str, str], ...]:
    """Return all ways to say a motion, each as (drifts left, drifting left)."""
    if thing.motion in STAYING:
        return STAYING[thing.motion]
    if thing.motion in DIRECTION_WORDS:
        ways = DIRECTION_WORDS[thing.motion]
    else:
        vertical, horizontal = thing.motion.split("-")
        edge = {"up": ("upper", "top"), "down": ("lower", "bottom")}[vertical]
        ways = (
            f"{vertical} and to the {horizontal}",
            f"diagonally {vertical} and {horizontal}",
            f"to the {edge[0]} {horizontal}",
            f"towards the {edge[1]} {horizontal}",
            f"towards the {edge[0]} {horizontal} corner",
            f"{vertical} and {horizontal}",
        )
    return tuple((f"{verb} {way}", f"{gerund} {way}") for way in ways for verb, gerund in GOING)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _pick_pair(rng: np.random.Generator, choices: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    return choices[int(rng.integers(len(choices)))]
