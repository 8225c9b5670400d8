"""Measure what clips of held-out prompts show, for every variant and backend, through the ordinary runtime.

    python examples/shapes/evaluate.py
    python examples/shapes/evaluate.py --slug shapes --backend torch --precision bf16 --output shapes.json
    python examples/shapes/evaluate.py --checkpoint runs/shapes/export --wan-folder runs/shapes/export

First the measure itself is tried: it must read drawn scenes right and noise as nothing. Then there are three rows for
each engine: held-out prompts with one object, prompts with two, and the end of clips of four times the trained length.
Exit code 1: the measure, or a variant with four steps, is not good enough.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from causal_forcing.build_engines.shapes.evaluation import (
    Evaluation,
    Scores,
    draw_clips,
    draw_noise,
    evaluate,
    held_out_cases,
    misses,
    pair_cases,
    score,
)
from causal_forcing.runtime import EngineOptions, UsageError, console, find_or_build, load_engines
from causal_forcing.runtime.model_spec import SHAPES
from causal_forcing.runtime.variant import VARIANTS

SLUGS = [slug for slug, variant in VARIANTS.items() if variant.model == SHAPES]
BACKENDS = ["onnxruntime"]

READ_RIGHT = 0.98
"""Least share of drawn scenes that the measure must read right, in every respect."""

READ_IN_NOISE = 0.02
"""Largest share of noise in which it may find what was asked for."""

HEADERS = ("variant", "backend", "prompts", "clips", "colour", "shape", "motion", "background", "kept", "steady fps")


def main(
    slug: Annotated[list[str], typer.Option(help="Variant to evaluate; repeatable.")] = SLUGS,
    backend: Annotated[list[str], typer.Option(help="Backend to evaluate; repeatable.")] = BACKENDS,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default the backend's own.")] = None,
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda or cuda:N.")] = "auto",
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Held-out prompts with one object; all by default.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=0, help="Prompts with two objects.")] = 24,
    long: Annotated[int, typer.Option(min=0, help="Clips of four times the trained length.")] = 12,
    checkpoint: Annotated[Path | None, typer.Option(help="DiT checkpoint in place of the included one.")] = None,
    wan_folder: Annotated[Path | None, typer.Option(help="Folder with text encoder, tokenizer and VAE.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for all results.")] = None,
) -> None:
    """Evaluate, print a table, and say what is missed."""
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}; make it, or name another file")
    rows, results, missed = check_measure(prompts, pairs)
    for name in backend:
        for variant in slug:
            options = EngineOptions(
                slug=variant, backend=name, precision=precision, checkpoint=checkpoint, wan_folder=wan_folder
            )
            console.narrate(f"{variant} on {name}")
            engines = load_engines(find_or_build(options, device), device=device, text_encoder="keep")
            config, where = engines.manifest.config, str(engines.device)
            found = evaluate(engines, prompts=prompts, pairs=pairs, long=long, progress=console.narrate)
            rows += evaluation_rows(variant, f"{config.backend} {config.precision} {where}", found)
            results.append(
                {
                    "slug": variant,
                    "backend": config.backend,
                    "precision": config.precision,
                    "device": where,
                    "weights": config.weights,
                    "fingerprint": config.fingerprint(),
                    "evaluation": dataclasses.asdict(found),
                }
            )
            missed += [f"{variant} on {name}: {miss}" for miss in misses(found.single, config.variant)]
    console.print_table(HEADERS, rows)
    if output is not None:
        output.write_text(json.dumps({"results": results, "missed": missed}, indent=2) + "\n", encoding="utf-8")
    for miss in missed:
        console.narrate(f"missed: {miss}")
    if missed:
        raise typer.Exit(1)


def check_measure(prompts: int | None, pairs: int) -> tuple[list[list[str]], list[dict[str, Any]], list[str]]:
    """Score drawn scenes and noise in place of clips; returns rows, results, and what is wrong with the measure."""
    single, both = held_out_cases(prompts), pair_cases(pairs)
    console.narrate("the measure on drawn scenes and on noise")
    truth, noise = score(single, draw_clips(single)), score(single, draw_noise(single))
    truth_pairs = score(both, draw_clips(both))
    wrong = [
        f"the measure reads {n} of drawn scenes {s.fraction:.1%} right"
        for n, s in truth.items()
        if s.fraction < READ_RIGHT
    ]
    wrong += [
        f"the measure reads {n} in {s.fraction:.1%} of noise" for n, s in noise.items() if s.fraction > READ_IN_NOISE
    ]
    found = (("drawn", "one object", truth), ("drawn", "two objects", truth_pairs), ("noise", "one object", noise))
    rows = [score_row(what, "", asked, scores) for what, asked, scores in found]
    return (
        rows,
        [{"slug": what, "prompts": asked, "scores": dataclasses.asdict(scores)} for what, asked, scores in found],
        wrong,
    )


def evaluation_rows(variant: str, backend: str, found: Evaluation) -> list[list[str]]:
    """Return a variant's rows of the table."""
    return [
        score_row(variant, backend, "one object", found.single, fps=found.steady_fps),
        score_row(variant, backend, "two objects", found.pairs),
        # By then every motion has come to its end.
        score_row(variant, backend, "end of 4× length", found.long, without=("motion",)),
    ]


def score_row(
    variant: str, backend: str, asked: str, scores: Scores, *, fps: float | None = None, without: tuple[str, ...] = ()
) -> list[str]:
    """Return one row of the table."""
    shares = ["–" if name in without else f"{share.fraction:.1%}" for name, share in scores.items()]
    return [variant, backend, asked, str(scores.background.of), *shares, "" if fps is None else f"{fps:.1f}"]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    console.run_program(functools.partial(app, standalone_mode=False))
