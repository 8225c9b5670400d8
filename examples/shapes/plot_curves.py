"""Draw the curves of a training run from its logs.

    python examples/shapes/plot_curves.py

By default of the run that made the included weights, whose logs lie in `logs/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import matplotlib.pyplot as plt
import typer

HERE = Path(__file__).parent

PANELS = (
    ("text", "Prompt encoder", ("accuracy",), "share of right answers"),
    ("vae", "VAE", ("psnr",), "PSNR of a batch, dB"),
    ("diffusion", "Autoregressive diffusion", ("loss_3", "loss_1"), "flow, mean square error"),
    ("distil", "ODE distillation", ("loss_3", "loss_1"), "distance from the goal"),
)
NAMES = {"loss_3": "chunks of 3", "loss_1": "chunks of 1"}


def main(
    logs: Annotated[Path, typer.Option(help="Folder of the logs.")] = HERE / "logs",
    output: Annotated[Path, typer.Option(help="PNG file.")] = HERE / "curves.png",
) -> None:
    """Write the picture."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 3.6), layout="constrained")
    for axis, (stage, title, curves, unit) in zip(axes, PANELS, strict=True):
        lines = (logs / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        for name in curves:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            axis.plot(*zip(*points, strict=True), label=NAMES.get(name), linewidth=1)
        if "loss" in curves[0]:
            axis.set_yscale("log")
            axis.legend()
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
    figure.savefig(output, dpi=80)
    typer.echo(output)


if __name__ == "__main__":
    typer.run(main)
