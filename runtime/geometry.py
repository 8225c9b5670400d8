"""The shapes of a video, its latents, tokens and cache: plain data, no framework.

Dimension letters, here and in every docstring: B batch, F latent frames, T pixel frames, C channels, H and W height and
width (h and w in latents), L tokens of a chunk, N attention heads, D head dim, S cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from causal_forcing.runtime.errors import UsageError

LATENT_STRIDE = 8
"""Pixels per latent cell, both directions (Wan VAE stride 4, 8, 8)."""

FRAMES_PER_LATENT = 4
"""Pixel frames per latent frame; the first latent frame of a clip gives one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The fixed shapes that an engine is compiled for."""

    chunk_frames: int
    """Latent frames of a chunk."""
    pixel_height: int
    """Height of the video, a multiple of 16."""
    pixel_width: int
    """Width of the video, a multiple of 16."""
    window_frames: int
    """Latent frames that the KV cache holds."""
    sink_frames: int = 0
    """Latent frames that never leave the cache."""
    batch: int = 1
    """Clips generated side by side."""
    patch_size: int = 2
    """Latent cells per token, both directions."""

    def __post_init__(self) -> None:
        multiple = LATENT_STRIDE * self.patch_size
        for name, value in (("height", self.pixel_height), ("width", self.pixel_width)):
            if value < multiple or value % multiple:
                nearest = max(multiple, round(value / multiple) * multiple)
                raise UsageError(
                    f"pixel {name} {value} is not a positive multiple of {multiple}: use --pixel-{name} {nearest}"
                )
            if value > 4096:
                raise UsageError(f"pixel {name} {value} is above 4096: the model was trained at 480×832")
        if self.sink_frames < 0 or self.window_frames < 1:
            raise UsageError(
                f"window_frames {self.window_frames} and sink_frames {self.sink_frames} must be at least 1 and 0"
            )
        if self.sink_frames + self.chunk_frames > self.window_frames:
            raise UsageError(
                f"a window of {self.window_frames} latent frames cannot hold {self.sink_frames} sink frames and a "
                f"chunk of {self.chunk_frames}: use --window-frames {self.sink_frames + self.chunk_frames} or more"
            )

    @property
    def latent_height(self) -> int:
        """Rows h of a latent frame."""
        return self.pixel_height // LATENT_STRIDE

    @property
    def latent_width(self) -> int:
        """Columns w of a latent frame."""
        return self.pixel_width // LATENT_STRIDE

    @property
    def token_rows(self) -> int:
        """Rows of tokens of a latent frame."""
        return self.latent_height // self.patch_size

    @property
    def token_columns(self) -> int:
        """Columns of tokens of a latent frame."""
        return self.latent_width // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame (upstream `frame_seq_length`): 1560 at 480×832."""
        return self.token_rows * self.token_columns

    @property
    def chunk_tokens(self) -> int:
        """Tokens L of a chunk."""
        return self.chunk_frames * self.tokens_per_frame

    @property
    def cache_slots(self) -> int:
        """Token slots S of the KV cache."""
        return self.window_frames * self.tokens_per_frame

    @property
    def ring_is_chunk_aligned(self) -> bool:
        """Whether every chunk lands in consecutive slots, so that one linear write places it."""
        ring_frames = self.window_frames - self.sink_frames
        return self.chunk_frames == 1 or (
            ring_frames % self.chunk_frames == 0 and self.sink_frames % self.chunk_frames == 0
        )


def frame_count(latent_frames: int) -> int:
    """Return how many pixel frames a clip of that many latent frames has: 1 + 4(F − 1)."""
    return 1 + FRAMES_PER_LATENT * (latent_frames - 1)
