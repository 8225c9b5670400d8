"""Build or load an engine of the `cuda` backend, with random weights, in a process of its own.

`cuda_engine_process.py build tiny|wide CHUNK_FRAMES ROOT` prints the engine directory; `… load FOLDER` makes a clip and
prints its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import torch

from causal_forcing.build_engines.builder import ALL_PARTS, BuildJob, build
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.loading import load_engines
from causal_forcing.runtime.model_spec import TINY, DiTSpec, ModelSpec, VAESpec
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.session import VideoSession

# Heads of 128 and channels from 96 on, as the full model has: what the kernels for Hopper take.
WIDE = ModelSpec(
    name="wide",
    dit=DiTSpec(dim=256, ffn_dim=640, num_heads=2, num_layers=3, freq_dim=64, text_dim=32, text_len=64),
    vae=VAESpec(base_dim=96, num_res_blocks=1),
    text=TINY.text,
)


def build_engine(model: str, chunk_frames: int, root: Path) -> Path:
    """Build an engine: `tiny` with all its parts, `wide` without a text encoder, framewise without a decoder too."""
    height, width = (32, 48) if model == "tiny" else (64, 96)
    options = EngineOptions(
        slug="tiny", backend="cuda", precision="bf16", pixel_height=height, pixel_width=width, window_frames=9
    )
    config = resolve_engine(options, weights="random:0", device="cuda", for_build=True)
    chosen = TINY if model == "tiny" else WIDE
    config = dataclasses.replace(
        config,
        variant=dataclasses.replace(config.variant, model=chosen, chunk_frames=chunk_frames),
        geometry=dataclasses.replace(config.geometry, chunk_frames=chunk_frames),
    )
    parts = ALL_PARTS if model == "tiny" else ("dit", "vae") if chunk_frames > 1 else ("dit",)
    folder = config.folder(root / f"{model}-{chunk_frames}")
    build(BuildJob(config=config, source=RandomModels(model=chosen, seed=0, dtype=torch.bfloat16), parts=parts), folder)
    return folder


def make_clip(folder: Path) -> str:
    """Load an engine and generate a clip from no prompt at all; returns the hash of its bits."""
    digest = hashlib.sha256()
    engines = load_engines(folder, device="cuda")
    dit = engines.manifest.config.variant.model.dit
    with VideoSession(engines) as session:
        for chunk in session.generate(torch.zeros(1, dit.text_len, dit.text_dim), total_blocks=4):
            assert chunk.latents.isfinite().all()
            for tensor in (chunk.latents, chunk.pixels):
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if sys.argv[1] == "build":
        print(build_engine(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
    else:
        print(make_clip(Path(sys.argv[2])))
