"""The passes of the DiT over a chunk: placed in the cache, denoised step by step, left there by the context pass.

Nothing here waits for the device: all that the host hands over goes through `upload`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.kv_cache import CacheRing
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.noise import NoiseSource
from causal_forcing.runtime.rope import RopePhases
from causal_forcing.runtime.schedule import DenoisingStep, add_noise_, flow_to_x0_, plan_variant, timestep_embedding
from causal_forcing.runtime.upload import host_buffer, upload


class ChunkPlace:
    """Tells an engine where consecutive chunks lie: their slots, how many slots are valid, their RoPE phases.

    Args:
        io_tensors: The session's buffers.
        geometry: Of the engine.
        ring: Where frames lie in the cache.
        prefix: Start of the buffers' names.
        chunks: How many chunks a pass covers.
    """

    def __init__(
        self, io_tensors: Mapping[str, torch.Tensor], geometry: Geometry, ring: CacheRing, prefix: str, chunks: int
    ) -> None:
        self._slots, self._valid_slots = io_tensors[f"{prefix}slots"], io_tensors[f"{prefix}valid_slots"]
        self._ring, self._chunk_frames, self._chunks = ring, geometry.chunk_frames, chunks
        self._rope = RopePhases(
            io_tensors[f"{prefix}rope_cos"],
            io_tensors[f"{prefix}rope_sin"],
            frames=chunks * geometry.chunk_frames,
            rows=geometry.token_rows,
            columns=geometry.token_columns,
        )

    def at(self, start_frame: int) -> None:
        """Say that the first chunk starts at this latent frame of the clip."""
        starts = [start_frame + chunk * self._chunk_frames for chunk in range(self._chunks)]
        upload(self._slots, torch.tensor([slot for start in starts for slot in self._ring.slots(start)]))
        if self._chunks == 1:
            self._valid_slots.fill_(self._ring.valid_slots(start_frame))
        else:
            upload(self._valid_slots, torch.tensor([self._ring.valid_slots(start) for start in starts]))
        self._rope.place(start_frame)


class Denoiser:
    """Runs the DiT's engines, chunk by chunk.

    With an engine `dit_context_step` the context pass of a chunk and the first denoising pass of the next are one pass
    of two segments, for as long as the window has room for both: their keys are then all in different slots.

    Args:
        engines: Loaded and bound.
        io_tensors: Their buffers.

    Attributes:
        latent: [B, F, C, h, w] fp32, the chunk as far as it has been denoised.
    """

    def __init__(self, engines: EngineSet, io_tensors: Mapping[str, torch.Tensor]) -> None:
        config = engines.manifest.config
        self._io, self._engines, self._geometry = io_tensors, engines.engines, config.geometry
        self._plan = plan_variant(config.variant)
        self._pair = engines.engines.get("dit_context_step")
        ring = CacheRing(config.geometry)
        self._place = ChunkPlace(io_tensors, config.geometry, ring, "", 1)
        self._place_pair = None if self._pair is None else ChunkPlace(io_tensors, config.geometry, ring, "pair_", 2)
        latent = io_tensors["latent"]
        self.latent = latent.float().clone()
        self._workspace = latent.double()
        self._noise = torch.zeros((self._plan.max_steps, *latent.shape), dtype=torch.float32, device=latent.device)
        self._begun: int | None = None  # start frame of the chunk whose first flow is there already
        target = io_tensors["timestep_embedding"]
        target.copy_(timestep_embedding(torch.tensor(self._plan.timesteps), target.shape[1]))
        engines.engines["timestep_modulation"].enqueue()
        self._layer_table, self._head_table = io_tensors["layer_modulation_table"], io_tensors["head_modulation_table"]

    def reset(self) -> None:
        """Make ready for a new clip: no frame, and no NaN, of the one before may stay in a cache."""
        self._begun = None
        for _, cache in self._engines["dit_step"].spec.states:
            self._io[cache].zero_()

    @torch.inference_mode()
    def take(self, start_frame: int, latents: torch.Tensor) -> None:
        """Take a chunk that is clean already."""
        self._place.at(start_frame)
        self.latent.copy_(latents)
        self._io["latent"].copy_(self.latent)

    @torch.inference_mode()
    def denoise(self, start_frame: int, generated: int, noise: NoiseSource) -> None:
        """Denoise a chunk from noise into `latent`.

        Args:
            start_frame: Its first latent frame in the clip.
            generated: Its place among the generated chunks.
            noise: Where its noise comes from.
        """
        steps = self._steps(generated)
        has_flow = self._begun == start_frame
        if not has_flow:
            self._draw(generated, noise)
        self._place.at(start_frame)
        for index, step in enumerate(steps):
            if index > 0 or not has_flow:
                self._io["latent"].copy_(self.latent)
                self._io["layer_modulation"].copy_(self._layer_table[step.table_index])
                self._io["head_modulation"].copy_(self._head_table[step.table_index])
                self._engines["dit_step"].enqueue()
            flow_to_x0_(self.latent, self._io["flow"], step.sigma, self._workspace)
            if step.next_sigma is not None:
                add_noise_(self.latent, self._noise[index + 1], step.next_sigma)
        self._io["latent"].copy_(self.latent)

    @torch.inference_mode()
    def write_context(self, start_frame: int, following: int | None, noise: NoiseSource, *, is_initial: bool) -> None:
        """Leave the clean chunk's keys and values in the cache, for the chunks to come.

        Args:
            start_frame: First latent frame of the chunk, whose latent is in the engines' buffer.
            following: The next chunk's place among the generated ones, to begin it in the same pass; None where the
                next chunk is clean already.
            noise: Where its noise comes from.
            is_initial: Whether the clean chunk was given, not generated.
        """
        table_index = self._plan.initial_index if is_initial else self._plan.context_index
        next_frame = start_frame + self._geometry.chunk_frames
        has_room = next_frame + self._geometry.chunk_frames <= self._geometry.window_frames
        if following is None or self._pair is None or self._place_pair is None or not has_room:
            self._io["layer_modulation"].copy_(self._layer_table[table_index])
            self._engines["dit_context"].enqueue()
            return
        first = self._steps(following)[0]
        self._draw(following, noise)
        self._place_pair.at(start_frame)
        self._io["next_latent"].copy_(self.latent)
        self._io["pair_modulation"][:, 0].copy_(self._layer_table[table_index])
        self._io["pair_modulation"][:, 1].copy_(self._layer_table[first.table_index])
        self._io["head_modulation"].copy_(self._head_table[first.table_index])
        self._pair.enqueue()
        self._begun = next_frame

    def _steps(self, generated: int) -> tuple[DenoisingStep, ...]:
        return self._plan.chunk if generated else self._plan.first_chunk

    def _draw(self, generated: int, noise: NoiseSource) -> None:
        """Draw a chunk's noise; the chunk starts as the first of it."""
        drawn = host_buffer(tuple(self._noise.shape), self._noise.device)
        noise.fill(generated, drawn)
        upload(self._noise, drawn)
        self.latent.copy_(self._noise[0])
