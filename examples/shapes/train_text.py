"""Train the prompt encoder of `shapes`: from a caption, tell every attribute of its scene.

The probes that ask for the attributes are thrown away; what stays are rows from which attention can read them, as the
denoiser's cross-attention does. A few minutes on two CPU cores.

    python examples/shapes/train_text.py --output runs/shapes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import typer
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from torch import nn
from training import Run

from causal_forcing.build_engines.models.text_encoder import TextEncoder
from causal_forcing.build_engines.shapes.captions import vocabulary, write_caption
from causal_forcing.build_engines.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    all_things,
    draw_scene,
)
from causal_forcing.runtime.model_spec import SHAPES as MODEL
from causal_forcing.runtime.text import Tokenizer

BATCH = 256
LEARNING_RATE = 1e-3
UNKNOWN_WORDS = 0.03
"""Share of words that training hides, so that a word outside the vocabulary does no harm."""

ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "motion": MOTIONS}


class Probes(nn.Module):
    """Read every attribute of up to two objects, and the background, by attention over a prompt's rows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # One class more than an attribute has values: there is no such object.
        self.classes = [len(values) + 1 for values in ATTRIBUTES.values()] * 2 + [len(BACKGROUNDS)]
        self.queries = nn.Parameter(torch.randn(len(self.classes), dim) * dim**-0.5)
        self.keys = nn.Linear(dim, dim)
        self.heads = nn.ModuleList(nn.Linear(dim, count) for count in self.classes)

    def forward(self, rows: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Return logits [B, classes] of each question for rows [B, T, dim]."""
        scores = torch.einsum("qd,btd->bqt", self.queries, self.keys(rows))
        weights = scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1)
        read = weights @ rows
        return [head(read[:, index]) for index, head in enumerate(self.heads)]


def answers(scene: Scene) -> list[int]:
    """Return the right class of every question."""
    found = []
    for position in range(2):
        thing = scene.things[position] if position < len(scene.things) else None
        for name, values in ATTRIBUTES.items():
            found.append(len(values) if thing is None else list(values).index(getattr(thing, name)))
    return [*found, BACKGROUNDS.index(scene.background)]


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json`: one id a word of the captions, `</s>` at the end, `<unk>` for every other word."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel(vocab={word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(words[:3])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z0-9]+|[^\sa-z0-9]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def main(
    output: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/shapes"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1500,
    seed: Annotated[int, typer.Option(help="Seed of weights and captions.")] = 0,
) -> None:
    """Train, print accuracy on held-out scenes, and write `text.pt` and the tokenizer."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(output / "tokenizer")
    tokenizer = Tokenizer(output / "tokenizer", length=MODEL.dit.text_len, pad_id=MODEL.text.pad_id)
    encoder = TextEncoder(MODEL.text, max_tokens=MODEL.dit.text_len).train()
    probes = Probes(MODEL.text.dim)
    parameters = [*encoder.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    run = Run(output, "text", steps=steps, minutes=math.inf)
    while True:
        scenes = [draw_scene(rng, pair_probability=0.4) for _ in range(BATCH)]
        tokens = tokenizer.encode([write_caption(rng, scene) for scene in scenes])
        ids, mask = torch.from_numpy(tokens.token_ids), torch.from_numpy(tokens.token_mask)
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        ids = torch.where((torch.rand(ids.shape) < UNKNOWN_WORDS) & (ids > 2), 2, ids)
        logits = probes(encoder(ids, mask), mask)
        wanted = torch.tensor([answers(scene) for scene in scenes])
        loss = torch.stack([F.cross_entropy(logit, wanted[:, i]) for i, logit in enumerate(logits)]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        run.log(every=20, loss=loss.detach(), accuracy=accuracy(logits, wanted))
        if not run.advance():
            break
    typer.echo(f"held-out scenes: {_held_out_accuracy(encoder.eval(), probes, tokenizer, rng):.4f} of answers right")
    run.save(seed=seed, encoder=encoder.state_dict())


def accuracy(logits: Sequence[torch.Tensor], wanted: torch.Tensor) -> float:
    """Return the share of right answers."""
    right = [(logit.argmax(-1) == wanted[:, index]).float().mean() for index, logit in enumerate(logits)]
    return float(torch.stack(right).mean())


@torch.inference_mode()
def _held_out_accuracy(encoder: TextEncoder, probes: Probes, tokenizer: Tokenizer, rng: np.random.Generator) -> float:
    scenes = [
        Scene(things=(thing,), background=background)
        for thing in all_things(held_out=True)
        for background in BACKGROUNDS
    ]
    tokens = tokenizer.encode([write_caption(rng, scene) for scene in scenes])
    mask = torch.from_numpy(tokens.token_mask)
    logits = probes(encoder(torch.from_numpy(tokens.token_ids), mask), mask)
    return accuracy(logits, torch.tensor([answers(scene) for scene in scenes]))


if __name__ == "__main__":
    typer.run(main)
