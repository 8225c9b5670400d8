"""Where a chunk's frames go in the KV cache: a ring behind the sink frames, in which nothing is ever shifted."""

from __future__ import annotations

from causal_forcing.runtime.geometry import Geometry


class CacheRing:
    """Places the frames of a clip, chunk by chunk.

    The first `sink_frames` of the clip keep their slots for good; every later frame takes the slots of the oldest frame
    behind them. So the cache always holds the sink and the latest frames that fit, which is what upstream's shifting
    cache holds (upstream evicts once a chunk, when its first pass would overflow; the chunk's own frames count).

    Args:
        geometry: Window, sink, chunk and tokens per frame.

    Source: thu-ml/Causal-Forcing@1fc7bbc wan/modules/causal_model.py CausalWanSelfAttention.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry

    def slots(self, start_frame: int) -> list[int]:
        """Return the first slot of each frame of the chunk that starts at `start_frame`."""
        geometry = self._geometry
        return [
            geometry.tokens_per_frame * self._frame_slot(frame)
            for frame in range(start_frame, start_frame + geometry.chunk_frames)
        ]

    def valid_slots(self, start_frame: int) -> int:
        """Return how many slots hold frames once the chunk that starts at `start_frame` is written."""
        geometry = self._geometry
        return geometry.tokens_per_frame * min(start_frame + geometry.chunk_frames, geometry.window_frames)

    def _frame_slot(self, frame: int) -> int:
        sink_frames = self._geometry.sink_frames
        if frame < sink_frames:
            return frame
        return sink_frames + (frame - sink_frames) % (self._geometry.window_frames - sink_frames)
