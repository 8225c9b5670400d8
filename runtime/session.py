"""The hot path: a prompt to chunks of frames.

A clip, read from top to bottom: encode the prompt; for each chunk place it in the cache, denoise it in a few passes,
decode it, hand it out, and write its clean keys and values with the context pass.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from causal_forcing.plugins.ranks import Ranks, count_ranks, current_ranks, decoding_ranks
from causal_forcing.runtime.decoder import NoDecoder, StreamingDecoder, WanDecoder
from causal_forcing.runtime.denoiser import Denoiser
from causal_forcing.runtime.encoder import WanEncoder
from causal_forcing.runtime.errors import ImageError, PromptError, UsageError
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.noise import NoiseSource, SeededNoise
from causal_forcing.runtime.prompt_cache import PromptCache, prompt_key
from causal_forcing.runtime.text import Tokenizer, clean_prompt


class PromptTruncated(UserWarning):
    """A prompt was longer than the text encoder takes; the message says what was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What a session hands out: a few frames, as soon as they are decoded."""

    index: int
    """Position in the clip, from 0; initial latents count."""
    latents: torch.Tensor
    """[B, F, C, h, w] fp32, denoised; a copy, the caller's to keep."""
    pixels: torch.Tensor
    """[B, T, 3, H, W] fp32 in [0, 1]; a copy, the caller's to keep. No frames (T = 0) where another rank decodes."""
    stream: torch.cuda.Stream | None = None
    """Stream that decodes it, where that is not the current one; the current one goes on when it is done."""

    def frames(self, clip: int = 0) -> npt.NDArray[np.uint8]:
        """Return the frames of one clip of the batch, [T, H, W, 3] RGB; truncated to 8 bits as upstream does."""
        # On the stream that decodes, so that it does not wait for the passes that follow on the current one.
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            frames = (self.pixels[clip] * 255).to(torch.uint8).permute(0, 2, 3, 1)
            return frames.contiguous().cpu().numpy()


class VideoSession:
    """Generates clips with one set of engines, one clip at a time.

    Where engines are for several ranks, each rank has a session, and all of them start the same clips in step: from the
    same seed, with the first rank's prompt and image.

    Args:
        engines: From `load_engines`; the session binds its buffers to them, so they serve one session at a time.
        prompt_cache: Where the embeddings of prompts are kept; None encodes every prompt.

    Attributes:
        prompt_source: Where the embedding of the clip's prompt came from: `given`, `cached`, or `encoded`; None before.

    Raises:
        UsageError: The engines are for another number of ranks.
    """

    def __init__(self, engines: EngineSet, *, prompt_cache: PromptCache | None = None) -> None:
        self._engines = engines
        self._prompt_cache = prompt_cache
        self.prompt_source: str | None = None
        self._config = engines.manifest.config
        ranks = self._config.context_parallel
        if ranks not in (1, count_ranks()):
            raise UsageError(
                f"{engines.folder} is for {ranks} ranks, got {count_ranks()}: make clips with cf-generate "
                f"--context-parallel {ranks}, or build an engine for one"
            )
        self._ranks: Ranks | None = None if ranks == 1 else current_ranks(ranks)
        if self._ranks is not None and self._config.decoder == "wan":
            decoding_ranks(ranks)  # makes their group here, where all ranks pass and nothing is on its way between them
        self._io = engines.bind()
        self._denoiser = Denoiser(engines, self._io)
        self._decoder = self._make_decoder()
        self._tokenizer: Tokenizer | None = None
        self._clip: object = None
        self._decode_stream: torch.cuda.Stream | None = None
        if engines.device.type == "cuda":  # above the passes in priority: frames that are ready leave first
            self._decode_stream = torch.cuda.Stream(engines.device, priority=-1)  # type: ignore[no-untyped-call]

    def generate(
        self,
        prompt: str | torch.Tensor,
        *,
        total_blocks: int | None = None,
        seed: int = 0,
        image: npt.NDArray[np.float32] | None = None,
        initial_latents: torch.Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Iterator[Chunk]:
        """Start a clip.

        Args:
            prompt: Text, or a prompt embedding [B, ≤ text_len, text_dim].
            total_blocks: Chunks of the clip, initial ones included; None goes on without end.
            seed: Seed of the noise.
            image: [1, 3, 1, H, W] in [−1, 1], from `load_image`: the clip's first frame (I2V).
            initial_latents: [B, k·F, C, h, w] fp32: latents that the clip begins with, in place of an image.
            noise: Where noise comes from, in place of the seed.

        Returns:
            An iterator over the chunks. Each is denoised and decoded when it is asked for. On a CPU its context pass
            runs when the next one is asked for; a GPU runs it, and the next chunk's first denoising pass where they are
            one, while the caller looks at the chunk. Starting another clip ends this one.

        Raises:
            PromptError: The prompt is empty, or the engines have no text encoder.
            ImageError: An image for a text-to-video model, or none for an image-to-video one.
            UsageError: Another argument does not fit, or the session is closed.
        """
        if not self.__dict__:
            raise UsageError("this session is closed: make another with VideoSession(load_engines(folder))")
        if total_blocks is not None and total_blocks < 1:
            raise UsageError(f"total_blocks {total_blocks} makes no video: use 1 or more")
        variant = self._config.variant
        if variant.takes_image and image is None and initial_latents is None:
            raise ImageError(f"{variant.slug} starts from an image and none was given: add --image-path FILE")
        if image is not None:
            if initial_latents is not None:
                raise UsageError("a clip starts from an image or from initial latents: give one or the other")
            if not variant.takes_image:
                raise ImageError(
                    f"{variant.slug} makes video from text alone: leave out --image-path or use an i2v slug"
                )
            initial_latents = self._encode_image(image)
            self._share(initial_latents)
        initial = self._split_initial(initial_latents)
        self._encode_prompt(prompt)
        self._decoder.reset()
        self._denoiser.reset()
        self._clip = clip = object()
        return self._chunks(clip, initial, noise or SeededNoise(seed), total_blocks)

    def close(self) -> None:
        """Free the buffers and engines; the session cannot be used afterwards."""
        self.__dict__.clear()

    def __enter__(self) -> VideoSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _chunks(
        self, clip: object, initial: list[torch.Tensor], noise: NoiseSource, total_blocks: int | None
    ) -> Iterator[Chunk]:
        self._check_current(clip)
        for index in itertools.count() if total_blocks is None else range(total_blocks):
            start_frame, generated = index * self._config.geometry.chunk_frames, index - len(initial)
            if generated < 0:
                self._denoiser.take(start_frame, initial[index])
            else:
                self._denoiser.denoise(start_frame, generated, noise)
            chunk = self._hand_out(index)
            following = generated + 1 if generated >= -1 else None
            is_last = index + 1 == total_blocks
            if self._decode_stream is None:
                yield chunk
                self._check_current(clip)
            elif index == 0:  # somebody waits for the first frames: no pass shares the GPU with them
                self._await_decode()
            if not is_last:
                self._denoiser.write_context(start_frame, following, noise, is_initial=generated < 0)
            if self._decode_stream is not None:
                self._await_decode()
                if self._ranks is not None and self._ranks.index > 0:
                    self._decode_stream.synchronize()  # nobody takes frames here, which would keep the host in step
                yield chunk
                self._check_current(clip)

    def _await_decode(self) -> None:
        """Let what is enqueued from here on wait for the chunk being decoded; the host goes on."""
        assert self._decode_stream is not None, "only a GPU decodes on a stream of its own"
        torch.cuda.current_stream(self._engines.device).wait_stream(self._decode_stream)

    def _check_current(self, clip: object) -> None:
        if self.__dict__.get("_clip") is not clip:
            raise UsageError("this clip has ended: its session was closed or started another")

    @torch.no_grad()  # not inference_mode, whose tensors a caller could not change
    def _hand_out(self, index: int) -> Chunk:
        """Decode the chunk; on a GPU by a stream of its own, which the caller's does not wait for here."""
        latents, stream = self._denoiser.latent.clone(), self._decode_stream
        if stream is None:
            return Chunk(index=index, latents=latents, pixels=self._decode())
        caller = torch.cuda.current_stream(self._engines.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            pixels = self._decode()
            pixels.record_stream(caller)
        return Chunk(index=index, latents=latents, pixels=pixels, stream=stream)

    def _decode(self) -> torch.Tensor:
        return self._decoder.decode().float().clamp(-1, 1).mul(0.5).add(0.5)

    def _encode_prompt(self, prompt: str | torch.Tensor) -> None:
        embeds = self._io["prompt_embeds"]
        if isinstance(prompt, torch.Tensor):
            batch, length, width = embeds.shape
            if prompt.dim() != 3 or (prompt.shape[0], prompt.shape[2]) != (batch, width) or prompt.shape[1] > length:
                raise PromptError(f"prompt embedding {tuple(prompt.shape)} does not fit {tuple(embeds.shape)}")
            embeds.zero_()
            embeds[:, : prompt.shape[1]].copy_(prompt)
            self.prompt_source = "given"
        elif self._ranks is None or self._ranks.index == 0:
            self._encode_text(prompt)
        self._share(embeds)
        self._engines.engines["prompt_kv"].enqueue()

    def _encode_text(self, prompt: str) -> None:
        text_encoder = self._engines.text_encoder
        if text_encoder is None:
            raise PromptError("this engine has no text encoder: give a prompt embedding, or rebuild it with cf-build")
        if not clean_prompt(prompt):
            raise PromptError("the prompt is empty: say what to show, as in --prompt 'a cat on a beach'")
        batch, length = self._io["token_ids"].shape
        if self._tokenizer is None:
            pad_id = self._config.variant.model.text.pad_id
            self._tokenizer = Tokenizer(self._engines.tokenizer_folder, length=length, pad_id=pad_id)
        tokenized = self._tokenizer.encode([prompt] * batch)
        if tokenized.dropped[0]:
            warnings.warn(
                f"the prompt is longer than {length} tokens; cut: {tokenized.dropped[0]!r}",
                PromptTruncated,
                stacklevel=4,
            )
        cache, embeds = self._prompt_cache, self._io["prompt_embeds"]
        key = "" if cache is None else prompt_key(self._engines, tokenized.token_ids)
        known = None if cache is None else cache.load(key, embeds)
        if known is not None:
            embeds.copy_(known)
            self.prompt_source = "cached"
            return
        self._io["token_ids"].copy_(torch.from_numpy(tokenized.token_ids))
        self._io["token_mask"].copy_(torch.from_numpy(tokenized.token_mask))
        text_encoder.enqueue()
        if cache is not None:
            cache.store(key, embeds)
        self.prompt_source = "encoded"

    def _share(self, x: torch.Tensor) -> None:
        """Give every rank what the first one has, in place."""
        if self._ranks is not None:
            self._ranks.share(x)

    def _encode_image(self, image: npt.NDArray[np.float32]) -> torch.Tensor:
        expected = tuple(self._io["image"].shape)
        if image.shape[1:] != expected[1:]:
            raise ImageError(f"an image of shape {image.shape} does not fit the engine's {expected}: use load_image")
        engines = self._engines.engines
        encoder = WanEncoder(engines["vae_encoder_first"], engines["vae_encoder"], self._io)
        return encoder.encode(torch.from_numpy(image))

    def _split_initial(self, initial_latents: torch.Tensor | None) -> list[torch.Tensor]:
        if initial_latents is None:
            return []
        chunk = self._denoiser.latent.shape
        # Everything but the number of frames must agree.
        others = [axis for axis in range(5) if axis != 1]
        if (
            initial_latents.dim() != 5
            or any(initial_latents.shape[axis] != chunk[axis] for axis in others)
            or not initial_latents.shape[1]
            or initial_latents.shape[1] % chunk[1]
        ):
            raise UsageError(
                f"initial latents {tuple(initial_latents.shape)} do not fit: expected {tuple(chunk)} or a multiple of "
                f"{chunk[1]} latent frames"
            )
        return list(torch.split(initial_latents, chunk[1], dim=1))

    def _make_decoder(self) -> StreamingDecoder:
        engines = self._engines.engines
        decodes_elsewhere = self._ranks is not None and self._ranks.index > 0 and self._config.decoder != "wan"
        if "vae_decoder" not in engines or decodes_elsewhere:
            return NoDecoder(self._io["latent"])
        return WanDecoder(engines["vae_decoder_first"], engines["vae_decoder"], self._io)
