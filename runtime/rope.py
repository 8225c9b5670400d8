"""RoPE phases of a chunk: three axes, computed in fp64 and handed to the engines as fp32 cosines and sines."""

from __future__ import annotations

import torch

from causal_forcing.runtime.upload import upload

BASE = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Split a head dim over time, height and width: 128 gives 44, 42, 42."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Return position × frequency, [positions, dim/2] fp64; the exponent counts within this axis, not the head."""
    frequencies = BASE ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return positions.to(torch.float64)[:, None] * frequencies


class RopePhases:
    """Writes a chunk's phases into the engines' `rope_cos` and `rope_sin`.

    Only the time axis changes from chunk to chunk, so the spatial part is written once. There is no last position:
    upstream's tables end at 1024 latent frames, these angles are computed as they come.

    Args:
        rope_cos: [L, D/2] fp32, the engines' input buffer; written here.
        rope_sin: [L, D/2] fp32, likewise.
        frames: Latent frames F of a chunk.
        rows: Token rows of a frame.
        columns: Token columns of a frame.

    Source: thu-ml/Causal-Forcing@1fc7bbc wan/modules/model.py rope_params, wan/modules/causal_model.py
    causal_rope_apply.
    """

    def __init__(self, rope_cos: torch.Tensor, rope_sin: torch.Tensor, *, frames: int, rows: int, columns: int) -> None:
        self._frames = frames
        self._time_dim, row_dim, column_dim = axis_dims(2 * rope_cos.shape[1])
        row_angles = _angles(torch.arange(rows), row_dim)[:, None].expand(rows, columns, -1)
        column_angles = _angles(torch.arange(columns), column_dim)[None].expand(rows, columns, -1)
        spatial = torch.cat((row_angles, column_angles), dim=-1).reshape(1, rows * columns, -1)
        self._time_parts: list[torch.Tensor] = []
        for target in (rope_cos, rope_sin):
            function = torch.cos if target is rope_cos else torch.sin
            per_frame = target.view(frames, rows * columns, -1)
            per_frame[..., self._time_dim // 2 :].copy_(function(spatial))
            self._time_parts.append(per_frame[..., : self._time_dim // 2])
        self._phases = torch.zeros((2, frames, self._time_dim // 2), dtype=rope_cos.dtype, device=rope_cos.device)

    def place(self, start_frame: int) -> None:
        """Write the phases of a chunk that starts at latent frame `start_frame` of the clip."""
        angles = _angles(torch.arange(start_frame, start_frame + self._frames), self._time_dim)
        upload(self._phases, torch.stack((torch.cos(angles), torch.sin(angles))))
        for part, phases in zip(self._time_parts, self._phases, strict=True):
            part.copy_(phases[:, None])
