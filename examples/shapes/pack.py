"""Write trained weights as the released ones are laid out: bf16 safetensors under upstream's names, and where from.

    python examples/shapes/pack.py --run runs/shapes --output weights

The folder serves as `--checkpoint` and `--wan-folder`; in the package it is `build_engines/shapes/weights`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from causal_forcing.build_engines.models.text_encoder import upstream_names
from causal_forcing.build_engines.shapes.world import TRAINED_FRAMES
from causal_forcing.build_engines.weights import TEXT_ENCODER_FILE, TOKENIZER_FILE, VAE_FILE
from causal_forcing.runtime.manifest import file_sha256
from causal_forcing.runtime.model_spec import SHAPES
from causal_forcing.runtime.variant import find_variant

StateDict = dict[str, torch.Tensor]


def main(
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/shapes"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("weights"),
) -> None:
    """Write the files and `provenance.json`, and print the pin that belongs into `runtime/variant.py`."""
    stages = {name: _load(run / f"{name}.pt") for name in ("text", "vae", "diffusion", "distil")}
    names = upstream_names(SHAPES.text)
    dit_file = find_variant("shapes").checkpoint_file
    assert dit_file is not None, "shapes has a checkpoint"
    files: dict[str, StateDict] = {
        dit_file: {f"model.{name}": tensor for name, tensor in stages["distil"]["average"].items()},
        VAE_FILE: stages["vae"]["vae"],
        TEXT_ENCODER_FILE: {theirs: stages["text"]["encoder"][ours] for theirs, ours in names.items()},
    }
    written = []
    for name, state in files.items():
        path = (output / name).with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.bfloat16().contiguous() for key, tensor in state.items()}, path)
        written.append(path)
    tokenizer = output / TOKENIZER_FILE
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "tokenizer" / "tokenizer.json", tokenizer)
    provenance = {
        "model": SHAPES.name,
        "recipe": "examples/shapes/README.md",
        "trained_frames": TRAINED_FRAMES,
        "runs": [{"stage": name, **one} for name, stage in stages.items() for one in stage["runs"]],
        "sha256": {path.relative_to(output).as_posix(): file_sha256(path) for path in sorted([*written, tokenizer])},
    }
    (output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    table = json.dumps(provenance["sha256"], sort_keys=True)
    typer.echo(f"{SHAPES.name}@{hashlib.sha256(table.encode()).hexdigest()[:12]}")


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


if __name__ == "__main__":
    typer.run(main)
