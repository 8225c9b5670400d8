"""Upstream itself as a peer: its pipeline, DiT and VAE from a clone, at the engine's sizes, with random weights.

What is timed is upstream's own code, `CausalInferencePipeline.inference`. Only what stands around it is replaced:
weights are drawn in place of being loaded, the prompt embedding is random in place of being encoded, modules that clips
never reach are left out, and where no flash-attn is installed attention is torch's with cuDNN preferred, which
upstream's own fallback would leave to torch.

Source: thu-ml/Causal-Forcing@1fc7bbc pipeline/causal_inference.py, utils/wan_wrapper.py, wan/modules/.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clips import SEED, Clip, frames_of, random_initial_latent, random_prompt
from benchmarks.timing import CallLog, Mark, marker, synchronize
from benchmarks.upstream_modules import draw_weights, import_pipeline, randomise_zeros
from causal_forcing.runtime.config import EngineConfig

HEADS, HEAD_DIM, LAYERS, CACHE_SLOTS = 12, 128, 30, 32760
"""Sizes that upstream's pipeline has as literals; other models need caches made for them."""

BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Attention of torch, the first that takes a shape: heads of the VAE are too wide for the first two."""


class UpstreamPeer:
    """Upstream's pipeline at an engine's sizes.

    Args:
        root: A clone of thu-ml/Causal-Forcing.
        config: The engine's; its carrier's precision, geometry and denoising steps count.
        dtype: Type of weights and activations.
        device: Where to run.
        chunks: Chunks of a clip.
    """

    def __init__(self, root: Path, config: EngineConfig, dtype: torch.dtype, device: torch.device, chunks: int) -> None:
        self._config, self._device, self._chunks, self._dtype = config, device, chunks, dtype
        self._log = CallLog(marker(device))
        variant, geometry = config.variant, config.geometry
        self._initial = random_initial_latent(config)
        window = config.geometry.window_frames
        arguments = types.SimpleNamespace(
            denoising_step_list=list(variant.denoising_steps),
            warp_denoising_step=variant.warp_steps,
            denoising_step_list_first_chunk=variant.first_chunk_denoising_steps,
            num_frame_per_block=geometry.chunk_frames,
            independent_first_frame=False,
            context_noise=variant.context_timestep,
            model_kwargs={
                "timestep_shift": variant.timestep_shift,
                "local_attn_size": -1 if window * geometry.tokens_per_frame == CACHE_SLOTS else window,
                "sink_size": geometry.sink_frames,
            },
        )
        with _quiet(), torch.no_grad():
            causal_inference = import_pipeline(root)
            draw_weights(config, device)
            text = _RandomText(random_prompt(config, device).to(dtype))
            pipeline = causal_inference.CausalInferencePipeline(arguments, device=device, text_encoder=text)
            pipeline = pipeline.to(dtype=dtype).to(device).eval()
            randomise_zeros(pipeline)
        self._pipeline = pipeline
        self._fit_caches()
        pipeline.generator.forward = self._logged("pass", pipeline.generator.forward)
        pipeline.vae.decode_to_pixel = self._logged("decode", pipeline.vae.decode_to_pixel)

    def clip(self, *, staged: bool) -> Clip:
        """Make a clip: all chunks first and their decode at the end, as upstream does."""
        generator = torch.Generator().manual_seed(SEED)
        initial = None if self._initial is None else self._initial.to(self._device, self._dtype)
        geometry = self._config.geometry
        frames = self._chunks * geometry.chunk_frames - (0 if initial is None else initial.shape[1])
        channels = self._config.variant.model.dit.latent_channels
        noise = torch.randn(1, frames, channels, geometry.latent_height, geometry.latent_width, generator=generator)
        self._log.is_open = staged
        synchronize(self._device)
        begun_s = time.perf_counter()
        with _quiet(), torch.no_grad(), sdpa_kernel(list(BACKENDS), set_priority=True):
            noise = noise.to(self._device, self._dtype)
            video = self._pipeline.inference(noise, ["a prompt that is already encoded"], initial_latent=initial)
            shown = (video * 255).to(torch.uint8).cpu()
        total_ms = 1000 * (time.perf_counter() - begun_s)
        self._log.is_open = False
        self._pipeline.vae.model.clear_cache()
        made = frames_of(self._config, self._chunks)
        assert shown.shape[1] == made, f"upstream made {shown.shape[1]} frames, expected {made}"
        stages = tuple(self._steps(self._log.take())) if staged else ()
        return Clip(frames=made, total_ms=total_ms, stage_ms=stages)

    def facts(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}

    def first_latents(self) -> None:
        """Return nothing: its weights and its noise are other ones."""

    def close(self) -> None:
        """Free everything."""
        self.__dict__.clear()

    def _steps(self, calls: list[tuple[str, Mark, Mark]]) -> Iterator[dict[str, float]]:
        """Yield the stages of each AR step; the last also has the decode of the whole clip."""
        passes = [begin.elapsed_ms(end) for name, begin, end in calls if name == "pass"]
        (decode,) = [begin.elapsed_ms(end) for name, begin, end in calls if name == "decode"]
        variant = self._config.variant
        initial_chunks = 0 if self._initial is None else 1
        for index in range(self._chunks):
            generated = index - initial_chunks
            steps = variant.denoising_steps
            if generated == 0 and variant.first_chunk_denoising_steps:
                steps = variant.first_chunk_denoising_steps
            count = len(steps) if generated >= 0 else 0
            stages = {"context": passes[count]} | ({"denoise": sum(passes[:count])} if count else {})
            passes = passes[count + 1 :]
            yield stages | ({"decode_of_the_clip": decode} if index + 1 == self._chunks else {})
        assert not passes, f"{len(passes)} passes of upstream belong to no chunk"

    def _logged(self, name: str, call: Any) -> Any:
        return lambda *args, **kwargs: self._log.run(name, lambda: call(*args, **kwargs))

    def _fit_caches(self) -> None:
        """Give a model of other sizes caches that fit it; upstream makes its own for the full-size model."""
        dit, geometry, pipeline = self._config.variant.model.dit, self._config.geometry, self._pipeline
        pipeline.frame_seq_length, pipeline.num_transformer_blocks = geometry.tokens_per_frame, dit.num_layers
        if (dit.num_heads, dit.head_dim, dit.num_layers) == (HEADS, HEAD_DIM, LAYERS):
            return

        def zeros(slots: int) -> torch.Tensor:
            return torch.zeros(1, slots, dit.num_heads, dit.head_dim, dtype=self._dtype, device=self._device)

        def index() -> torch.Tensor:
            return torch.tensor([0], dtype=torch.long, device=self._device)

        slots = geometry.cache_slots
        pipeline.kv_cache1 = [
            {"k": zeros(slots), "v": zeros(slots), "global_end_index": index(), "local_end_index": index()}
            for _ in range(dit.num_layers)
        ]
        pipeline.crossattn_cache = [{"is_init": False} for _ in range(dit.num_layers)]


class _RandomText(nn.Module):
    """Stands in for the text encoder: the same embedding for every prompt."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__()
        self._embedding = embedding

    def forward(self, text_prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": self._embedding}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what upstream prints to stderr: stdout is the record's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
