"""Streaming encode: an image, or a video, to the latents that a clip starts from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.geometry import FRAMES_PER_LATENT


class WanEncoder:
    """The Wan VAE encoder.

    Args:
        first: Engine `vae_encoder_first`.
        following: Engine `vae_encoder`.
        io_tensors: The session's buffers.
    """

    def __init__(self, first: Engine, following: Engine, io_tensors: Mapping[str, torch.Tensor]) -> None:
        self._first, self._following = first, following
        self._image, self._video = io_tensors["image"], io_tensors["video"]
        self._latent = io_tensors["encoded_latent"]

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Encode an image or a video.

        Args:
            video: [B, 3, T, H, W] in [−1, 1]; T = 1 is an image. Frames beyond 1 + 4k are left out, as upstream does.

        Returns:
            [B, 1 + (T − 1) // 4, C, h, w] fp32, normalised.
        """
        self._image.copy_(video[:, :, :1])
        self._first.enqueue()
        latents = [self._latent.float().clone()]
        for start in range(1, video.shape[2] - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT):
            self._video.copy_(video[:, :, start : start + FRAMES_PER_LATENT])
            self._following.enqueue()
            latents.append(self._latent.float().clone())
        return torch.cat(latents, dim=1)
