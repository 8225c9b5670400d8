"""Scenes as latents and token ids, on the device: what the denoiser is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from train_vae import Codec
from training import DEVICE

from causal_forcing.build_engines.models.text_encoder import TextEncoder
from causal_forcing.build_engines.models.vae import WanVAE
from causal_forcing.build_engines.shapes.captions import write_caption
from causal_forcing.build_engines.shapes.world import (
    TRAINED_FRAMES,
    TRAINED_LATENT_FRAMES,
    Scene,
    Tracks,
    draw_scene,
    draw_tracks,
    render,
)
from causal_forcing.runtime.geometry import FRAMES_PER_LATENT
from causal_forcing.runtime.model_spec import SHAPES as MODEL
from causal_forcing.runtime.text import Tokenizer
from causal_forcing.runtime.variant import find_variant

SINK_FRAMES = find_variant("shapes").sink_frames
"""Latent frames at the start that stay in the cache of a long clip."""

LATE_SHARE = 0.25
"""Share of scenes of which a later stretch is seen behind the first frames, as the cache of a long clip holds them."""

LATEST_FRAME = 30
"""Latent frames that such a stretch lies later, at most."""

ENCODED_TOGETHER = 64
CAPTIONS = 2
"""Captions of a scene; each batch takes one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step of training sees."""

    latents: torch.Tensor
    """[B, 9, C, h, w] fp32."""
    positions: torch.Tensor
    """[B, 9] int64: place of each latent frame in its clip."""
    prompt_embeds: torch.Tensor
    """[B, text_len, text_dim]."""


class Dataset:
    """Encoded scenes; the latents are kept in the run's folder for the next stage.

    Args:
        folder: The run's folder, with `vae.pt`, `text.pt` and the tokenizer.
        scenes: How many scenes.
        seed: Seed of the scenes.
    """

    def __init__(self, folder: Path, *, scenes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.codec = load_codec(folder)
        self._text = TextEncoder(MODEL.text, max_tokens=MODEL.dit.text_len).to(DEVICE).eval().requires_grad_(False)
        self._text.load_state_dict(torch.load(folder / "text.pt", map_location=DEVICE, weights_only=True)["encoder"])
        self._tokenizer = Tokenizer(folder / "tokenizer", length=MODEL.dit.text_len, pad_id=MODEL.text.pad_id)
        drawn = [draw_scene(rng) for _ in range(scenes)]
        encoded = folder / f"latents-{scenes}-{seed}.pt"
        if encoded.exists():
            self.latents, self.positions = torch.load(encoded, map_location=DEVICE, weights_only=True)
        else:
            starts = range(0, scenes, ENCODED_TOGETHER)
            parts = [self._encode(rng, drawn[start : start + ENCODED_TOGETHER]) for start in starts]
            self.latents, self.positions = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            torch.save((self.latents, self.positions), encoded)
        tokens = self._tokenizer.encode([write_caption(rng, scene) for _ in range(CAPTIONS) for scene in drawn])
        ids, mask = torch.from_numpy(tokens.token_ids), torch.from_numpy(tokens.token_mask)
        self._embeds = torch.cat(
            [self._embed(*part).bfloat16() for part in zip(ids.split(2048), mask.split(2048), strict=True)]
        )
        self.no_prompt = self.embed([""])

    def draw(self, size: int) -> Batch:
        """Draw a batch."""
        rows = torch.randint(len(self.latents), (size,), device=DEVICE)
        captions = rows + len(self.latents) * torch.randint(CAPTIONS, (size,), device=DEVICE)
        return Batch(
            latents=self.latents[rows].float(),
            positions=self.positions[rows],
            prompt_embeds=self._embeds[captions].float(),
        )

    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return prompt embeddings [B, text_len, text_dim]."""
        tokens = self._tokenizer.encode(list(prompts))
        return self._embed(torch.from_numpy(tokens.token_ids), torch.from_numpy(tokens.token_mask))

    @torch.no_grad()
    def _embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeds: torch.Tensor = self._text(ids.to(DEVICE), mask.to(DEVICE))
        return embeds

    @torch.no_grad()
    def _encode(self, rng: np.random.Generator, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents [B, 9, C, h, w] bf16 and positions [B, 9]."""
        positions = torch.arange(TRAINED_LATENT_FRAMES, device=DEVICE).repeat(len(scenes), 1)
        gap = int(rng.integers(1, LATEST_FRAME + 1))
        tracks = draw_tracks(rng, scenes, frames=TRAINED_FRAMES + FRAMES_PER_LATENT * gap)
        latents = self._latents(tracks.part(slice(None), slice(TRAINED_FRAMES)))
        late = round(LATE_SHARE * len(scenes))
        if late:
            later = self._latents(tracks.part(slice(late), slice(FRAMES_PER_LATENT * gap, None)))
            latents[:late, SINK_FRAMES:] = later[:, SINK_FRAMES:]
            positions[:late, SINK_FRAMES:] += gap
        return latents.bfloat16(), positions

    def _latents(self, tracks: Tracks) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            return self.codec.encode(2 * render(tracks, device=DEVICE) - 1).float()


def load_codec(folder: Path) -> Codec:
    """Load the trained VAE."""
    vae = WanVAE(MODEL.vae)
    vae.load_state_dict(torch.load(folder / "vae.pt", map_location="cpu", weights_only=True)["vae"])
    return Codec(vae).to(DEVICE).eval().requires_grad_(False)
