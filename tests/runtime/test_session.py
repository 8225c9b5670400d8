"""The session: a prompt to chunks of frames, through both backends, with every engine call listened to."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import itertools
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_forcing.build_engines.export import export_program, save_onnx
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.models.vae import VAEDecoderFirst, VAEEncoderFirst
from causal_forcing.build_engines.text_networks import text_networks
from causal_forcing.runtime.decoder import NoDecoder
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from causal_forcing.runtime.errors import ImageError, PromptError, UsageError
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.model_spec import TINY
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.noise import SeededNoise
from causal_forcing.runtime.session import Chunk, PromptTruncated, VideoSession
from causal_forcing.runtime.text_encoder import TextEncoder

PROMPT = "a paper boat on a rainy street"
WINDOW_FRAMES, TOKENS_PER_FRAME = 21, 6
# fp32 on both sides, sums in another order; what a denoised latent's error does to a pixel included.
BACKEND_TOLERANCE = 1e-4


class Listener:
    """An engine that writes its name and its placement down at each call."""

    def __init__(self, engine: Engine, calls: list[str], placements: list[tuple[str, list[int], int]]) -> None:
        self.spec: NetworkSpec = engine.spec
        self._engine, self._calls, self._placements = engine, calls, placements
        self.io: Mapping[str, torch.Tensor] = {}

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        self.io = io_tensors
        self._engine.bind(io_tensors)

    def enqueue(self) -> None:
        self._calls.append(self.spec.name)
        if self.spec.name.startswith("dit"):
            self._placements.append((self.spec.name, self.io["slots"].tolist(), int(self.io["valid_slots"][0])))
        self._engine.enqueue()


class Stage:
    """A session and what its engines were asked to do."""

    def __init__(self, engines: EngineSet, *, without: str | None = None) -> None:
        self.calls: list[str] = []
        self.placements: list[tuple[str, list[int], int]] = []
        listeners = {
            name: Listener(engine, self.calls, self.placements)
            for name, engine in engines.engines.items()
            if without is None or not name.startswith(without)
        }
        encoder = engines.text_encoder
        if encoder is not None:
            load = encoder.load
            encoder.load = lambda name: Listener(load(name), self.calls, self.placements)
        if without == "text_encoder":
            encoder = None
        self.engines = dataclasses.replace(engines, engines=listeners, text_encoder=encoder)
        self.session = VideoSession(self.engines)
        self.io = next(iter(listeners.values())).io

    def clip(self, prompt: str | torch.Tensor = PROMPT, **arguments: Any) -> list[Chunk]:
        """Generate a whole clip, listening from its first chunk on."""
        chunks = self.session.generate(prompt, **arguments)
        self.calls.clear()
        self.placements.clear()
        return list(chunks)

    def latents(self, **arguments: Any) -> torch.Tensor:
        """Generate a clip without decoding it, which takes torch longest."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.session, "_decoder", NoDecoder(self.io["latent"]))
            return latents_of(self.clip(**arguments))


@pytest.fixture(scope="module")
def t2v(tiny_engine: Path) -> Stage:
    return Stage(load_engines(tiny_engine, device="cpu"))


@pytest.fixture(scope="module")
def i2v(tiny_i2v_engine: Path) -> Stage:
    return Stage(load_engines(tiny_i2v_engine, device="cpu"))


@pytest.fixture(scope="module")
def short_clip(t2v: Stage) -> list[Chunk]:
    """The clip of PROMPT and seed 0, three chunks long."""
    return t2v.clip(total_blocks=3)


def latents_of(chunks: list[Chunk]) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=1)


def pixels_of(chunks: list[Chunk]) -> torch.Tensor:
    return torch.cat([chunk.pixels for chunk in chunks], dim=1)


def random_image(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).uniform(-1, 1, (1, 3, 1, 32, 48)).astype(np.float32)


# --- what is handed out ---------------------------------------------------------------------------------------------


def test_t2v_clip_has_chunks_of_three_latents_and_1_and_4_more_frames_each(short_clip: list[Chunk]) -> None:
    assert [chunk.index for chunk in short_clip] == [0, 1, 2]
    assert [tuple(chunk.latents.shape) for chunk in short_clip] == [(1, 3, 16, 4, 6)] * 3
    assert [tuple(chunk.pixels.shape) for chunk in short_clip] == [(1, n, 3, 32, 48) for n in (9, 12, 12)]
    assert pixels_of(short_clip).shape[1] == 1 + 4 * (9 - 1)


def test_chunk_pixels_are_finite_in_0_to_1_and_differ_from_frame_to_frame(short_clip: list[Chunk]) -> None:
    pixels = pixels_of(short_clip)
    assert pixels.dtype == torch.float32
    assert pixels.isfinite().all()
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert (pixels.diff(dim=1).abs().amax(dim=(0, 2, 3, 4)) > 0).all()


def test_chunk_frames_are_truncated_to_8_bits_and_channels_last(short_clip: list[Chunk]) -> None:
    frames = short_clip[0].frames()
    assert frames.shape == (9, 32, 48, 3)
    assert frames.dtype == np.uint8
    want = np.floor(short_clip[0].pixels[0].permute(0, 2, 3, 1).numpy() * np.float32(255))
    assert np.array_equal(frames, want)


def test_chunks_are_the_callers_to_keep(t2v: Stage) -> None:
    chunks = t2v.session.generate(PROMPT, total_blocks=3)
    first = next(chunks)
    kept = first.latents.clone(), first.pixels.clone()
    second = next(chunks)
    assert torch.equal(first.latents, kept[0])
    assert torch.equal(first.pixels, kept[1])
    want = next(t2v.session.generate(PROMPT, total_blocks=3)).latents
    first.latents.zero_()
    first.pixels.zero_()
    second.latents.zero_()
    again = t2v.clip(total_blocks=3)
    assert torch.equal(again[0].latents, want)


def test_first_chunk_is_handed_out_before_anything_of_the_second_runs(t2v: Stage) -> None:
    chunks = t2v.session.generate(PROMPT, total_blocks=2)
    t2v.calls.clear()
    next(chunks)
    assert t2v.calls == ["dit_step"] * 4 + ["vae_decoder_first"]
    t2v.calls.clear()
    next(chunks)
    assert t2v.calls == ["dit_context"] + ["dit_step"] * 4 + ["vae_decoder"]


def test_prompt_is_encoded_once_a_clip(t2v: Stage) -> None:
    t2v.calls.clear()
    chunks = t2v.session.generate(PROMPT, total_blocks=2)
    assert t2v.calls == ["text_encoder", "prompt_kv"]
    list(chunks)
    assert t2v.calls.count("text_encoder") == t2v.calls.count("prompt_kv") == 1
    assert "timestep_modulation" not in t2v.calls


# --- the same clip, and other clips ---------------------------------------------------------------------------------


def test_clip_of_the_same_seed_is_the_same_again(t2v: Stage, short_clip: list[Chunk]) -> None:
    again = t2v.clip(total_blocks=3)
    assert torch.equal(latents_of(again), latents_of(short_clip))
    assert torch.equal(pixels_of(again), pixels_of(short_clip))


def test_clip_of_fewer_blocks_is_the_beginning_of_a_longer_one(t2v: Stage, short_clip: list[Chunk]) -> None:
    assert torch.equal(pixels_of(t2v.clip(total_blocks=2)), pixels_of(short_clip[:2]))


@pytest.mark.parametrize("arguments", [{"seed": 1}, {"prompt": "another prompt"}], ids=str)
def test_clip_of_another_seed_or_prompt_differs_in_every_chunk(
    arguments: dict[str, Any], t2v: Stage, short_clip: list[Chunk]
) -> None:
    other = t2v.clip(total_blocks=3, **arguments)
    for chunk, one in zip(other, short_clip, strict=True):
        assert (chunk.latents - one.latents).abs().max() > 1e-3


def test_clip_of_a_noise_source_is_the_clip_of_its_seed(t2v: Stage, short_clip: list[Chunk]) -> None:
    given = t2v.clip(total_blocks=3, seed=99, noise=SeededNoise(0))
    assert torch.equal(latents_of(given), latents_of(short_clip))


def test_later_chunk_depends_on_the_chunks_before_it(t2v: Stage, short_clip: list[Chunk]) -> None:
    """The cache is read: with other noise in chunk 0 alone, chunk 1 differs."""

    class OtherStart:
        def fill(self, chunk_index: int, noise: torch.Tensor) -> None:
            SeededNoise(0 if chunk_index else 5).fill(chunk_index, noise)

    other = t2v.clip(total_blocks=2, noise=OtherStart())
    assert (other[1].latents - short_clip[1].latents).abs().max() > 1e-3


def test_clip_in_a_new_process_is_the_same_to_the_last_bit(short_clip: list[Chunk], tiny_engine: Path) -> None:
    script = (
        "import hashlib, sys, torch; torch.set_num_threads(int(sys.argv[3]))\n"
        "from causal_forcing.runtime.loading import load_engines\n"
        "from causal_forcing.runtime.session import VideoSession\n"
        "with VideoSession(load_engines(sys.argv[1], device='cpu')) as session:\n"
        "    chunks = list(session.generate(sys.argv[2], total_blocks=2))\n"
        "    print(hashlib.sha256(b''.join(chunk.pixels.numpy().tobytes() for chunk in chunks)).hexdigest())\n"
    )
    command = [sys.executable, "-c", script, str(tiny_engine), PROMPT, str(torch.get_num_threads())]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    here = hashlib.sha256(b"".join(chunk.pixels.numpy().tobytes() for chunk in short_clip[:2])).hexdigest()
    assert finished.stdout.strip() == here


def test_clip_of_both_backends_is_the_same_within_fp32(tiny_torch_engine: Path, short_clip: list[Chunk]) -> None:
    with VideoSession(load_engines(tiny_torch_engine, device="cpu")) as session:
        other = list(session.generate(PROMPT, total_blocks=2))
    torch.testing.assert_close(latents_of(other), latents_of(short_clip[:2]), atol=BACKEND_TOLERANCE, rtol=0)
    torch.testing.assert_close(pixels_of(other), pixels_of(short_clip[:2]), atol=BACKEND_TOLERANCE, rtol=0)


# --- without end ----------------------------------------------------------------------------------------------------


def test_endless_clip_goes_on_past_the_window_and_writes_over_its_oldest_frames(
    t2v: Stage, short_clip: list[Chunk]
) -> None:
    stream = t2v.session.generate(PROMPT, total_blocks=None)
    t2v.placements.clear()
    chunks = list(itertools.islice(stream, 9))
    assert [chunk.index for chunk in chunks] == list(range(9))
    assert torch.equal(pixels_of(chunks[:3]), pixels_of(short_clip))
    assert pixels_of(chunks).shape[1] == 1 + 4 * (27 - 1)
    assert latents_of(chunks).isfinite().all()
    steps = [(slots, valid) for name, slots, valid in t2v.placements if name == "dit_step"][::4]
    contexts = [(slots, valid) for name, slots, valid in t2v.placements if name == "dit_context"]
    # A context pass goes where its chunk's denoising passes went.
    assert contexts == steps[:8]
    for index, (slots, valid) in enumerate(steps):
        frames = [frame % WINDOW_FRAMES for frame in range(3 * index, 3 * index + 3)]
        assert slots == [frame * TOKENS_PER_FRAME for frame in frames]
        assert valid == min(3 * index + 3, WINDOW_FRAMES) * TOKENS_PER_FRAME


def test_endless_framewise_clip_writes_over_the_image_after_21_latent_frames(
    i2v: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(i2v.session, "_decoder", NoDecoder(i2v.io["latent"]))
    stream = i2v.session.generate(PROMPT, total_blocks=None, image=random_image())
    i2v.placements.clear()
    assert latents_of(list(itertools.islice(stream, 24))).isfinite().all()
    contexts = [slots[0] // TOKENS_PER_FRAME for name, slots, _ in i2v.placements if name == "dit_context"]
    assert contexts == [*range(21), 0, 1]


# --- image to video -------------------------------------------------------------------------------------------------


def test_i2v_clip_counts_the_images_block(i2v: Stage) -> None:
    chunks = i2v.clip(image=random_image(), total_blocks=3)
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [tuple(chunk.latents.shape) for chunk in chunks] == [(1, 1, 16, 4, 6)] * 3
    assert [chunk.pixels.shape[1] for chunk in chunks] == [1, 4, 4]


def test_i2v_clip_of_one_block_is_the_image_and_denoises_nothing(i2v: Stage) -> None:
    chunks = i2v.clip(image=random_image(), total_blocks=1)
    assert len(chunks) == 1
    assert "dit_step" not in i2v.calls


def test_i2v_clip_puts_the_image_into_the_cache_at_timestep_0_before_it_generates(i2v: Stage) -> None:
    i2v.latents(image=random_image(), total_blocks=2)
    assert i2v.calls[:5] == ["dit_context"] + ["dit_step"] * 4


def test_i2v_clips_first_frame_is_the_image_through_the_vae(i2v: Stage) -> None:
    vae = RandomModels(model=TINY, seed=0, dtype=torch.float32).vae()
    with torch.inference_mode():
        latent, *_ = VAEEncoderFirst(vae)(torch.from_numpy(random_image()))
        pixels, *_ = VAEDecoderFirst(vae)(latent)
    chunk = i2v.clip(image=random_image(), total_blocks=1)[0]
    torch.testing.assert_close(chunk.latents, latent, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(chunk.pixels, pixels.clamp(-1, 1) / 2 + 0.5, atol=1e-4, rtol=0)


def test_i2v_clip_of_another_image_differs_in_what_is_generated(i2v: Stage) -> None:
    one, other = (i2v.latents(image=random_image(seed), total_blocks=2) for seed in (0, 1))
    assert (one[:, 1] - other[:, 1]).abs().max() > 1e-3


def test_i2v_clip_of_the_images_latents_is_the_clip_of_the_image(i2v: Stage) -> None:
    from_image = i2v.latents(image=random_image(), total_blocks=3)
    assert torch.equal(i2v.latents(initial_latents=from_image[:, :1], total_blocks=3), from_image)


def test_clip_of_initial_latents_begins_with_them_and_draws_noise_from_chunk_0(t2v: Stage) -> None:
    asked = []

    class Asked:
        def fill(self, chunk_index: int, noise: torch.Tensor) -> None:
            asked.append(chunk_index)
            SeededNoise(0).fill(chunk_index, noise)

    initial = torch.randn(1, 6, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    chunks = t2v.clip(initial_latents=initial, total_blocks=4, noise=Asked())
    assert torch.equal(latents_of(chunks[:2]), initial)
    assert asked == [0, 1]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompt_as_an_embedding_gives_the_clip_of_the_text(t2v: Stage, short_clip: list[Chunk]) -> None:
    t2v.session.generate(PROMPT)
    embedding = t2v.io["prompt_embeds"].clone()
    chunks = t2v.clip(embedding, total_blocks=3)
    assert "text_encoder" not in t2v.calls
    assert torch.equal(pixels_of(chunks), pixels_of(short_clip))


def test_prompt_as_a_short_embedding_is_padded_with_zeros_whatever_came_before(t2v: Stage) -> None:
    embedding = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(1, 512, 32)
    padded[:, :5] = embedding
    want = t2v.clip(padded, total_blocks=1)
    t2v.session.generate(torch.ones(1, 512, 32))
    assert torch.equal(latents_of(t2v.clip(embedding, total_blocks=1)), latents_of(want))


@pytest.mark.parametrize("shape", [(1, 513, 32), (2, 5, 32), (1, 5, 31), (5, 32), (1, 1, 5, 32)])
def test_prompt_as_an_embedding_that_does_not_fit_says_both_shapes(shape: tuple[int, ...], t2v: Stage) -> None:
    with pytest.raises(PromptError) as caught:
        t2v.session.generate(torch.zeros(shape))
    assert str(caught.value) == f"prompt embedding {shape} does not fit (1, 512, 32)"


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", html.escape("\u00a0"), "&nbsp;"], ids=ascii)
def test_prompt_that_is_blank_is_refused(prompt: str, t2v: Stage) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        t2v.session.generate(prompt)


def test_prompt_beyond_512_tokens_warns_with_what_was_cut(t2v: Stage) -> None:
    # The test model's tokens are bytes; the last of the 512 is the end of the sequence.
    kept, cut = "x" * 511, "and these words are lost"
    with pytest.warns(PromptTruncated, match=f"longer than 512 tokens; cut: {cut!r}") as caught:
        chunks = t2v.session.generate(kept + cut, total_blocks=1)
    assert Path(caught[0].filename) == Path(__file__)
    long = latents_of(list(chunks))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(latents_of(t2v.clip(kept, total_blocks=1)), long)


def test_engines_of_a_split_text_encoder_run_in_order_and_give_the_clip_of_the_whole(
    tiny_engine: Path, tmp_path: Path, short_clip: list[Chunk]
) -> None:
    whole = load_engines(tiny_engine, device="cpu")
    config, source = whole.manifest.config, RandomModels(model=TINY, seed=0, dtype=torch.float32)
    parts = {}
    for network in text_networks(
        source, TINY.text, TINY.dit, config.geometry, precision=config.dtype, max_parameters=1
    ):
        path = tmp_path / f"{network.spec.name}.onnx"
        save_onnx(export_program(network), network, path, cache_writes=1)
        parts[network.spec.name] = OnnxRuntimeEngine(network.spec, path)
    specs = [engine.spec for engine in parts.values()]
    encoder = TextEncoder(specs, parts.__getitem__, whole.device, keep=False)
    stage = Stage(dataclasses.replace(whole, text_encoder=encoder))
    chunks = stage.session.generate(PROMPT, total_blocks=3)
    assert stage.calls[-4:] == ["text_encoder_1", "text_encoder_2", "text_encoder_3", "prompt_kv"]
    assert torch.equal(pixels_of(list(chunks)), pixels_of(short_clip))


def test_engines_without_a_text_encoder_take_embeddings_and_refuse_text(tiny_engine: Path) -> None:
    stage = Stage(load_engines(tiny_engine, device="cpu"), without="text_encoder")
    with pytest.raises(PromptError, match="no text encoder: give a prompt embedding, or rebuild it with cf-build"):
        stage.session.generate(PROMPT)
    assert latents_of(stage.clip(torch.zeros(1, 512, 32), total_blocks=1)).isfinite().all()


def test_engines_without_a_decoder_hand_out_the_latents_alone(tiny_engine: Path, short_clip: list[Chunk]) -> None:
    chunks = Stage(load_engines(tiny_engine, device="cpu"), without="vae_decoder").clip(total_blocks=2)
    assert torch.equal(latents_of(chunks), latents_of(short_clip[:2]))
    assert [chunk.pixels.shape[1] for chunk in chunks] == [0, 0]


# --- arguments that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("total_blocks", [0, -1])
def test_clip_without_blocks_is_refused(total_blocks: int, t2v: Stage) -> None:
    with pytest.raises(UsageError, match=f"total_blocks {total_blocks} makes no video: use 1 or more"):
        t2v.session.generate(PROMPT, total_blocks=total_blocks)


def test_seed_out_of_range_is_refused_before_anything_is_generated(t2v: Stage) -> None:
    with pytest.raises(UsageError, match="seed -1 is out of range"):
        t2v.session.generate(PROMPT, seed=-1)


def test_t2v_with_an_image_is_refused(t2v: Stage) -> None:
    with pytest.raises(ImageError, match="tiny makes video from text alone: leave out --image-path or use an i2v slug"):
        t2v.session.generate(PROMPT, image=random_image())


def test_i2v_without_an_image_is_refused(i2v: Stage) -> None:
    with pytest.raises(ImageError, match="tiny-i2v starts from an image and none was given: add --image-path FILE"):
        i2v.session.generate(PROMPT)


@pytest.mark.parametrize("shape", [(1, 3, 1, 48, 32), (1, 3, 32, 48), (1, 4, 1, 32, 48), (32, 48, 3)])
def test_i2v_with_an_image_of_another_shape_says_both(shape: tuple[int, ...], i2v: Stage) -> None:
    with pytest.raises(ImageError) as caught:
        i2v.session.generate(PROMPT, image=np.zeros(shape, dtype=np.float32))
    assert f"{shape} does not fit the engine's (1, 3, 1, 32, 48): use load_image" in str(caught.value)


def test_i2v_with_image_and_initial_latents_is_refused(i2v: Stage) -> None:
    with pytest.raises(UsageError, match="from an image or from initial latents: give one or the other"):
        i2v.session.generate(PROMPT, image=random_image(), initial_latents=torch.zeros(1, 1, 16, 4, 6))


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 16, 4, 6), (1, 0, 16, 4, 6), (2, 3, 16, 4, 6), (1, 3, 15, 4, 6), (1, 3, 16, 6, 4), (3, 16, 4, 6), (3,)],
)
def test_initial_latents_that_do_not_fit_say_both_shapes(shape: tuple[int, ...], t2v: Stage) -> None:
    with pytest.raises(UsageError) as caught:
        t2v.session.generate(PROMPT, initial_latents=torch.zeros(shape))
    assert str(caught.value) == (
        f"initial latents {shape} do not fit: expected (1, 3, 16, 4, 6) or a multiple of 3 latent frames"
    )


def test_clip_after_a_refused_one_is_as_ever(t2v: Stage, short_clip: list[Chunk]) -> None:
    with pytest.raises(UsageError):
        t2v.session.generate(PROMPT, seed=-1)
    assert torch.equal(pixels_of(t2v.clip(total_blocks=2)), pixels_of(short_clip[:2]))


# --- one clip at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks_before", [0, 1, 2])
def test_clip_ends_with_an_error_when_another_starts(chunks_before: int, t2v: Stage, short_clip: list[Chunk]) -> None:
    first = t2v.session.generate("another prompt", seed=5, total_blocks=3)
    list(itertools.islice(first, chunks_before))
    second = t2v.session.generate(PROMPT, total_blocks=3)
    begun = [next(second)]
    t2v.calls.clear()
    with pytest.raises(UsageError, match="this clip has ended: its session was closed or started another"):
        next(first)
    assert t2v.calls == [], "the ended clip must not touch what the new one uses"
    assert torch.equal(pixels_of(begun + list(second)), pixels_of(short_clip))


def test_clip_after_one_full_of_nan_is_clean(t2v: Stage, short_clip: list[Chunk]) -> None:
    """A masked NaN would leak through attention, so nothing of the last clip may stay in the caches."""
    poisoned = t2v.clip(initial_latents=torch.full((1, 6, 16, 4, 6), float("nan")), total_blocks=3)
    assert latents_of(poisoned).isnan().all()
    assert torch.equal(pixels_of(t2v.clip(total_blocks=3)), pixels_of(short_clip))


def test_session_that_is_closed_says_so(tiny_engine: Path) -> None:
    session = VideoSession(load_engines(tiny_engine, device="cpu"))
    chunks = session.generate(PROMPT, total_blocks=3)
    next(chunks)
    session.close()
    with pytest.raises(UsageError, match="its session was closed"):
        next(chunks)
    with pytest.raises(UsageError, match="this session is closed"):
        session.generate(PROMPT)
    session.close()


def test_session_as_a_context_manager_is_closed_even_by_an_error(tiny_engine: Path) -> None:
    def generate_then_fail() -> None:
        with VideoSession(load_engines(tiny_engine, device="cpu")) as session:
            sessions.append(session)
            next(session.generate(PROMPT, total_blocks=1))
            raise KeyError("the caller's own")

    sessions: list[VideoSession] = []
    with pytest.raises(KeyError, match="the caller's own"):
        generate_then_fail()
    with pytest.raises(UsageError, match="this session is closed"):
        sessions[0].generate(PROMPT)
