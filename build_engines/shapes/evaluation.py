"""Whether clips show what their prompts ask for: prompts that training never saw, clips of them, and scores.

Making clips and scoring them are apart, so that drawn scenes and noise go through the same scorer as a model's clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from causal_forcing.build_engines.shapes.captions import write_caption
from causal_forcing.build_engines.shapes.measures import Reading, ThingReading, read_clip
from causal_forcing.build_engines.shapes.world import (
    BACKGROUNDS,
    FRAME_PIXELS,
    SIZES,
    TRAINED_FRAMES,
    TRAINED_LATENT_FRAMES,
    Scene,
    Thing,
    all_things,
    draw_scene,
    draw_tracks,
    render,
)
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.session import VideoSession
from causal_forcing.runtime.variant import Variant

SCENES_A_THING = 3
"""Held-out prompts for each colour, shape and motion that training never saw together."""

LONG_CLIP = 4
"""Length of a long clip, in trained lengths."""

WANTED = {"colour": 0.95, "motion": 0.90, "shape": 0.85, "background": 0.95}
"""Least share of right answers to held-out prompts with one object."""

WANTED_STEPS = 4
"""Denoising passes from which on this is wanted."""

Frames = npt.NDArray[np.uint8]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt and what it asks for."""

    scene: Scene
    """What is to be seen."""
    prompt: str
    """The scene in words."""
    seed: int
    """Seed of the clip's noise, and of all that words leave open in a drawn clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What a model made of a case."""

    frames: Frames
    """[T, 128, 128, 3], RGB."""
    later_frames: int
    """Frames after the first chunk."""
    later_s: float
    """Seconds that these took, from the first chunk's frames on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Right answers of all."""

    right: int
    """Right answers."""
    of: int
    """Questions."""

    @property
    def fraction(self) -> float:
        """Share of right answers; 0 of none."""
        return self.right / self.of if self.of else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How many objects, and backgrounds, are what was asked for."""

    colour: Share
    """Objects of the right colour."""
    shape: Share
    """Objects of the right shape."""
    motion: Share
    """Objects with the right motion."""
    background: Share
    """Clips over the right background."""
    kept: Share
    """Objects that keep one colour and one shape from the first frame to the last, right or not."""

    def items(self) -> list[tuple[str, Share]]:
        """Return names and shares."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an engine directory was found to do."""

    single: Scores
    """Held-out prompts with one object."""
    pairs: Scores
    """Prompts with two objects."""
    long: Scores
    """The last trained length of clips that are `LONG_CLIP` times as long; motions have come to their end there."""
    steady_fps: float
    """Frames a second after a clip's first chunk, decoding included."""


def held_out_cases(count: int | None = None) -> list[Case]:
    """Return prompts with one object whose colour, shape and motion training never saw together.

    Args:
        count: How many of the 141; the first 47 already hold every such object once.
    """
    rng = np.random.default_rng(1)
    things = all_things(held_out=True)
    scenes = []
    for turn in range(SCENES_A_THING):
        for place in rng.permutation(len(things)):
            thing, size = things[place], list(SIZES)[(place + turn) % len(SIZES)]
            thing = Thing(colour=thing.colour, shape=thing.shape, motion=thing.motion, size=size)
            scenes.append(Scene(things=(thing,), background=BACKGROUNDS[(place + turn) % len(BACKGROUNDS)]))
    return _tell(scenes[:count], first_seed=1000)


def pair_cases(count: int = 24) -> list[Case]:
    """Return prompts with two objects, each of which training saw; hardly any two of them together."""
    rng = np.random.default_rng(2)
    scenes = [draw_scene(rng, pair_probability=1.0) for _ in range(count)]
    return _tell(scenes, first_seed=2000)


def draw_clips(cases: Iterable[Case]) -> Iterator[Frames]:
    """Draw every case as the world has it: what a perfect model would make, [33, 128, 128, 3] each."""
    for case in cases:
        tracks = draw_tracks(np.random.default_rng(case.seed), [case.scene])
        yield (render(tracks)[0] * 255).byte().permute(0, 2, 3, 1).numpy()


def draw_noise(cases: Iterable[Case]) -> Iterator[Frames]:
    """Draw colour noise in place of every case, in turn fine and in patches of 16 pixels, [33, 128, 128, 3] each."""
    for index, case in enumerate(cases):
        patch = (1, 16)[index % 2]
        size = FRAME_PIXELS // patch
        noise = np.random.default_rng(case.seed).integers(0, 256, (TRAINED_FRAMES, size, size, 3), np.uint8)
        yield noise.repeat(patch, 1).repeat(patch, 2)


def first_frame(case: Case) -> npt.NDArray[np.float32]:
    """Draw the image that an image-to-video clip starts from, [1, 3, 1, 128, 128] in [−1, 1], as `load_image` gives."""
    tracks = draw_tracks(np.random.default_rng(case.seed), [case.scene], frames=1)
    image = render(tracks)[0, 0].mul(255).byte().float().div(127.5).sub(1).numpy()
    return np.ascontiguousarray(image[None, :, None])


def make_clips(
    session: VideoSession, config: EngineConfig, cases: Iterable[Case], *, latent_frames: int = TRAINED_LATENT_FRAMES
) -> Iterator[Clip]:
    """Make a clip of every case.

    Args:
        session: Of an engine at 128×128.
        config: The engine's configuration.
        cases: What to make.
        latent_frames: Length of every clip.
    """
    chunks = latent_frames // config.geometry.chunk_frames
    for case in cases:
        image = first_frame(case) if config.variant.takes_image else None
        frames: list[Frames] = []
        later_s = started_s = 0.0
        for chunk in session.generate(case.prompt, total_blocks=chunks, seed=case.seed, image=image):
            frames.append(chunk.frames())
            if len(frames) == 1:
                started_s = time.perf_counter()
            if len(frames) == chunks:
                later_s = time.perf_counter() - started_s
                break  # one more would run a context pass that nothing needs
        yield Clip(frames=np.concatenate(frames), later_frames=sum(map(len, frames[1:])), later_s=later_s)


def score(cases: Sequence[Case], clips: Iterable[Frames]) -> Scores:
    """Read clips, [T, 128, 128, 3] each, and compare them with what was asked for."""
    right = dict.fromkeys((field.name for field in fields(Scores)), 0)
    for case, frames in zip(cases, clips, strict=True):
        reading = read_clip(frames)
        right["background"] += reading.background == case.scene.background
        for thing, seen in _match(case.scene, reading):
            right["colour"] += seen.colour == thing.colour
            right["shape"] += seen.shape == thing.shape
            right["motion"] += seen.motion == thing.motion
            right["kept"] += seen.kept
    objects = sum(len(case.scene.things) for case in cases)
    of = {name: len(cases) if name == "background" else objects for name in right}
    return Scores(**{name: Share(right=right[name], of=of[name]) for name in right})


def evaluate(
    engines: EngineSet,
    *,
    prompts: int | None = None,
    pairs: int = 24,
    long: int = 12,
    progress: Progress = lambda text: None,
) -> Evaluation:
    """Make clips with an engine directory and score them.

    Args:
        engines: Loaded, of a `shapes` slug at 128×128; their session ends here.
        prompts: Held-out prompts with one object; None takes all.
        pairs: Prompts with two objects.
        long: Held-out prompts of which a long clip is made.
        progress: Told what begins.
    """
    config = engines.manifest.config
    single_cases, long_cases = held_out_cases(prompts), held_out_cases(long)
    timed: list[Clip] = []

    def frames_of(cases: Sequence[Case], length: int) -> Iterator[Frames]:
        for clip in make_clips(session, config, cases, latent_frames=length * TRAINED_LATENT_FRAMES):
            timed.append(clip)
            yield clip.frames[-TRAINED_FRAMES:]

    with VideoSession(engines) as session:
        progress(f"{len(single_cases)} clips with one object")
        single = score(single_cases, frames_of(single_cases, 1))
        progress(f"{pairs} clips with two objects")
        both = score(pair_cases(pairs), frames_of(pair_cases(pairs), 1))
        progress(f"{len(long_cases)} clips of {LONG_CLIP} times the trained length")
        late = score(long_cases, frames_of(long_cases, LONG_CLIP))
    return Evaluation(single=single, pairs=both, long=late, steady_fps=steady_fps(timed))


def misses(scores: Scores, variant: Variant) -> list[str]:
    """Return which scores of held-out prompts are below `WANTED`; of fewer than four steps nothing is wanted."""
    if len(variant.denoising_steps) < WANTED_STEPS:
        return []
    shares = dict(scores.items())
    return [
        f"{name} {shares[name].fraction:.1%}, wanted {least:.0%}"
        for name, least in WANTED.items()
        if shares[name].fraction < least
    ]


def steady_fps(clips: Iterable[Clip]) -> float:
    """Return frames a second after the first chunks of clips."""
    frames, seconds = 0, 0.0
    for clip in clips:
        frames, seconds = frames + clip.later_frames, seconds + clip.later_s
    return frames / seconds if seconds else 0.0


def _tell(scenes: Sequence[Scene], *, first_seed: int) -> list[Case]:
    """Put every scene into words of its own."""
    return [
        Case(scene=scene, prompt=write_caption(np.random.default_rng((seed, 0)), scene), seed=seed)
        for seed, scene in enumerate(scenes, first_seed)
    ]


def _match(scene: Scene, reading: Reading) -> list[tuple[Thing, ThingReading]]:
    """Return what was asked for beside what is seen in its place: of two objects, the one of the same colour."""
    if len(scene.things) == 1:
        return [(scene.things[0], reading.things[0])] if len(reading.things) == 1 else []
    seen = {thing.colour: thing for thing in reading.things}
    return [(thing, seen[thing.colour]) for thing in scene.things if thing.colour in seen]
