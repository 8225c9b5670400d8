"""Make clips of a few prompts and put them into one picture, a clip a row, time to the right.

    python examples/shapes/contact_sheet.py

Everything goes through the ordinary runtime; the pictures are what `cf-generate SLUG PROMPT` makes, frame for frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from causal_forcing.build_engines.shapes.world import TRAINED_FRAMES, TRAINED_LATENT_FRAMES
from causal_forcing.runtime import EngineOptions, VideoSession, find_or_build, load_engines

HERE = Path(__file__).parent

PROMPTS = (
    "an orange star moves to the right over a checkered background",
    "a small cyan ball drifts to the upper right over a dark background",
    "on a white background, a big purple triangle shrinks",
    "a video of a yellow square sliding down over stripes",
    "a pink circle grows against black",
    "a blue triangle spins over a light background",
    "a small green star moves left and a red square stays still over a checkerboard",
)
GAP = 2  # pixels between pictures


def main(
    slug: Annotated[str, typer.Option(help="Variant that makes the clips.")] = "shapes",
    columns: Annotated[int, typer.Option(min=2, help="Frames of each clip that are shown.")] = 9,
    seed: Annotated[int, typer.Option(help="Seed of every clip.")] = 0,
    output: Annotated[Path, typer.Option(help="PNG file.")] = HERE / "contact-sheet.png",
) -> None:
    """Write the sheet."""
    folder = find_or_build(EngineOptions(slug=slug), device="cpu")
    engines = load_engines(folder, device="cpu", text_encoder="keep")
    chunk_frames = engines.manifest.config.geometry.chunk_frames
    blocks = TRAINED_LATENT_FRAMES // chunk_frames
    shown = np.linspace(0, TRAINED_FRAMES - 1, columns).round().astype(int)
    rows = []
    with VideoSession(engines) as session:
        for prompt in PROMPTS:
            chunks = session.generate(prompt, total_blocks=blocks, seed=seed)
            clip = np.concatenate([chunk.frames() for chunk in chunks])
            pictures = np.pad(clip[shown], ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
            rows.append(np.concatenate(list(pictures), axis=1))
    sheet = np.concatenate(rows)[:-GAP, :-GAP]
    Image.fromarray(sheet).save(output, optimize=True)
    typer.echo(output)


if __name__ == "__main__":
    typer.run(main)
