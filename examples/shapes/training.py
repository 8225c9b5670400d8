"""What all training stages share: a time budget, a log, averaged weights, checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Run:
    """One run of a stage: ends after so many steps or minutes, whichever comes first, and logs what happens.

    Args:
        folder: Where the stage's log and checkpoint lie.
        stage: Name of both.
        steps: Most steps of this run.
        minutes: Most minutes of this run.
    """

    def __init__(self, folder: Path, stage: str, *, steps: int, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / f"{stage}.pt"
        self._log = folder / f"{stage}.jsonl"
        self._steps, self._seconds = steps, 60 * minutes
        self._started_s = time.monotonic()
        self._last_s, self._last_step = self._started_s, 0
        self.step = 0
        self._runs_before: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Seconds since this run began."""
        return time.monotonic() - self._started_s

    @property
    def progress(self) -> float:
        """How much of this run is over, 0 to 1."""
        return min(1.0, max(self.step / self._steps, self.seconds / self._seconds))

    def preparation_ends(self) -> None:
        """Let progress begin now, in what is left of the minutes."""
        self._seconds = max(1.0, self._seconds - self.seconds)
        self._started_s = time.monotonic()

    def advance(self) -> bool:
        """Count a step; returns whether another one fits."""
        self.step += 1
        return self.progress < 1.0

    def learning_rate(self, peak: float, *, warmup: int = 100, decay_from: float = 0.5, floor: float = 0.05) -> float:
        """Return the rate of this step: warm-up, plateau, then a straight line down to a share of the peak."""
        if self.progress > decay_from:
            return peak * (1 - (1 - floor) * (self.progress - decay_from) / (1 - decay_from))
        return peak * min(1.0, (self.step + 1) / warmup)

    def log(self, every: int = 50, **values: torch.Tensor | float) -> None:
        """Write values to the log and the terminal, every so many steps."""
        if self.step % every and self.progress < 1.0:
            return
        numbers = {name: float(value) for name, value in values.items()}
        now_s = time.monotonic()
        rate = (self.step - self._last_step) / max(1e-9, now_s - self._last_s)
        self._last_s, self._last_step = now_s, self.step
        steps_before = sum(run["steps"] for run in self._runs_before)
        entry = {"step": steps_before + self.step, "seconds": round(self.seconds, 1), **numbers}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.step % (10 * every) == 0 or self.progress >= 1.0:
            told = " ".join(f"{name} {value:.5f}" for name, value in numbers.items())
            print(f"{self.checkpoint.stem} step {entry['step']} {self.seconds:.0f} s {rate:.1f}/s {told}", flush=True)

    def save(self, *, seed: int, **state: Any) -> None:
        """Write the checkpoint, whole or not at all, with what made it."""
        this = {
            "commit": commit(),
            "seed": seed,
            "steps": self.step,
            "minutes": round(self.seconds / 60, 2),
            "hardware": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({**state, "runs": [*self._runs_before, this]}, partial)
        os.replace(partial, self.checkpoint)

    def resume(self) -> dict[str, Any] | None:
        """Return the checkpoint of the run before, or None where this is the first."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, map_location=DEVICE, weights_only=True)
        self._runs_before = state["runs"]
        return state


class AveragedWeights:
    """Exponential moving average of a module's parameters.

    Args:
        module: The module that is trained.
        decay: Share that stays at each update, once the average is old enough.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self._updates = decay, 0
        self._parameters = list(module.parameters())
        self.tensors = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self.tensors, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Make the average the parameters of another module of the same make."""
        torch._foreach_copy_([parameter.detach() for parameter in module.parameters()], self.tensors)


class Optimizer:
    """Muon for the matrices of the transformer's layers, AdamW for everything else.

    Args:
        module: What is trained.
        muon: Whether to use Muon at all.
        weight_decay: Of both.
    """

    def __init__(self, module: nn.Module, *, muon: bool, weight_decay: float = 0.01) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if muon and p.dim() == 2 and name.startswith("blocks.")]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        fused = DEVICE.type == "cuda"
        self._all = [p for _, p in named]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused)
        ]
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, learning_rate: float) -> torch.Tensor:
        """Descend along the gradients, clipped to norm 1, and zero them in place; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self._all, 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad(set_to_none=False)
        return norm


def write_sheet(video: torch.Tensor, path: Path, *, columns: int = 9) -> None:
    """Write clips as rows of a PNG.

    Args:
        video: [B, T, 3, H, W] in [-1, 1].
        path: The file.
        columns: Frames of a clip that are shown.
    """
    chosen = torch.linspace(0, video.shape[1] - 1, columns).round().long().tolist()
    rows = ((video[:, chosen].float().clamp(-1, 1) + 1) * 127.5).byte().permute(0, 3, 1, 4, 2)
    Image.fromarray(rows.reshape(-1, columns * video.shape[-1], 3).cpu().numpy()).save(path)


def commit() -> str:
    """Return the commit that this is run from."""
    asked = subprocess.run(("git", "rev-parse", "HEAD"), cwd=Path(__file__).parent, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"
