"""Streaming decode: latent chunks to pixels, with the convolution caches inside the engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from causal_forcing.runtime.engine import Engine


class StreamingDecoder(Protocol):
    """Turns the chunk in the engines' `latent` buffer into pixels; `reset` starts a new clip."""

    def reset(self) -> None:
        """Forget the clip so far."""

    def decode(self) -> torch.Tensor:
        """Decode the next chunk.

        Returns:
            [B, T, 3, H, W] on the engines' device, about [−1, 1], unclamped; valid until the next call. T is
            1 + 4(F − 1) for the clip's first chunk and 4F for every other.
        """


class WanDecoder:
    """The full Wan VAE decoder.

    Args:
        first: Engine `vae_decoder_first`.
        following: Engine `vae_decoder`.
        io_tensors: The session's buffers.
    """

    def __init__(self, first: Engine, following: Engine, io_tensors: Mapping[str, torch.Tensor]) -> None:
        self._first, self._following = first, following
        self._first_pixels, self._pixels = io_tensors["pixels_first"], io_tensors["pixels"]
        self._at_start = True

    def reset(self) -> None:
        """See `StreamingDecoder.reset`: the first chunk's engine writes every cache anew."""
        self._at_start = True

    def decode(self) -> torch.Tensor:
        """See `StreamingDecoder.decode`."""
        if self._at_start:
            self._at_start = False
            self._first.enqueue()
            return self._first_pixels
        self._following.enqueue()
        return self._pixels


class NoDecoder:
    """Stands in where an engine was built without a decoder: hands out no pixels, only latents.

    Args:
        latent: [B, F, C, h, w], for device and batch.
    """

    def __init__(self, latent: torch.Tensor) -> None:
        self._nothing = latent.new_empty((latent.shape[0], 0, 3, 0, 0))

    def reset(self) -> None:
        """Nothing to forget."""

    def decode(self) -> torch.Tensor:
        """Return no frames."""
        return self._nothing
