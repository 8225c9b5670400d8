"""`cf-generate`: a prompt to a video."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from causal_forcing.runtime import console
from causal_forcing.runtime.cli_options import AsJson, Debug, Device, takes_engine_options
from causal_forcing.runtime.clip import ClipRequest, make_clip, recorded_engine
from causal_forcing.runtime.config import EngineOptions, GenerateConfig, launched_processes, package_version
from causal_forcing.runtime.errors import OutputError, RecordError, UnknownNameError, UsageError
from causal_forcing.runtime.record import ClipRecord, read_record, recorded_options
from causal_forcing.runtime.spec import VARIANTS, Variant
from causal_forcing.runtime.text import read_prompt

# Nothing imported here imports torch: `--help`, `--list` and every refusal must be instant.

DEFAULT_PROMPT = (
    "A paper boat drifts down a rain-soaked street at dusk, lantern light rippling in the puddles around it."
)
"""Used when no prompt is given."""

DEFAULT_TOTAL_BLOCKS = 7
"""81 frames chunkwise: five seconds, what the released models were trained for."""

OUTPUT_FOLDER = Path("outputs")

IMAGE_FITS = ("stretch", "crop")

app = typer.Typer(name="cf-generate", add_completion=False)


@app.command(no_args_is_help=True)
@takes_engine_options
def generate(
    options: EngineOptions,
    prompt: Annotated[
        str | None, typer.Option(help="Text of the clip, or a file whose first non-empty line is the text.")
    ] = None,
    image_path: Annotated[
        str | None, typer.Option(help="Image that the clip starts from, file or URL (i2v slugs).")
    ] = None,
    image_fit: Annotated[
        str, typer.Option(help="How an image of another shape is fitted: stretch, as upstream does, or crop.")
    ] = "stretch",
    total_blocks: Annotated[
        int | None, typer.Option(help=f"Chunks of the clip, an image's included. [default: {DEFAULT_TOTAL_BLOCKS}]")
    ] = None,
    endless: Annotated[bool, typer.Option("--endless", help="Go on until Ctrl-C.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
    output: Annotated[str | None, typer.Option(help="An .mp4 file, or a folder for PNG frames.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for clips without --output.")] = OUTPUT_FOLDER,
    fps: Annotated[int | None, typer.Option(min=1, help="Playback rate. [default: the model's, 16]")] = None,
    engine: Annotated[Path | None, typer.Option(help="Engine directory to use as it is.")] = None,
    device: Device = "auto",
    from_record: Annotated[
        Path | None, typer.Option(help="Repeat the clip of this record, the .json file beside a clip.")
    ] = None,
    list_slugs: Annotated[bool, typer.Option("--list", help="Show all slugs.")] = False,
    no_instantiate: Annotated[
        bool, typer.Option("--no-instantiate", help="Print the resolved options and leave.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Generate a video: find or build the engine, write frames as they are made, print the file's name."""
    if version:
        print(package_version())
        return
    if list_slugs:
        _print_slugs(as_json)
        return
    _refuse_several_processes()
    if from_record is not None:
        if options != EngineOptions() or prompt or image_path or total_blocks or endless or seed or fps or engine:
            raise UsageError(
                "--from-record repeats a clip as it was: leave out all but --output, --output-dir and --json"
            )
        _repeat(from_record, output, output_dir, as_json=as_json)
        return
    if endless and total_blocks is not None:
        raise UsageError("--endless excludes --total-blocks: give one or the other")
    if image_fit not in IMAGE_FITS:
        raise UnknownNameError("image fit", image_fit, IMAGE_FITS)
    variant = options.variant()
    config = GenerateConfig(
        prompt=_resolve_prompt(prompt),
        seed=seed,
        total_blocks=None if endless else DEFAULT_TOTAL_BLOCKS if total_blocks is None else total_blocks,
        image=image_path,
        image_fit=image_fit,
    )
    if no_instantiate:
        console.print_json({"engine": options, "geometry": options.geometry(), "generate": config, "variant": variant})
        return
    request = ClipRequest(
        options=options,
        generate=config,
        output=output or _free_name(output_dir, variant),
        fps=fps or variant.fps,
        device=device,
        engine_folder=engine,
    )
    _report(make_clip(request), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cf-generate`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console.run_program(functools.partial(app, args=words, prog_name="cf-generate", standalone_mode=False))


def _repeat(path: Path, output: str | None, output_dir: Path, *, as_json: bool) -> None:
    """Repeat the clip of a record, and make sure that its frames are the same."""
    record = read_record(path)
    options, config = recorded_options(record)
    request = ClipRequest(
        options=options,
        # A clip that was stopped is repeated as far as it got.
        generate=dataclasses.replace(config, total_blocks=record.blocks),
        output=output or _free_name(output_dir, options.variant()),
        fps=record.fps,
        device=record.device,
        engine_folder=recorded_engine(record),
    )
    again = make_clip(request)
    if again.frames_sha256 != record.frames_sha256:
        cause = f"engine {again.engine_fingerprint[:16]} now, {record.engine_fingerprint[:16]} then"
        if again.image_sha256 != record.image_sha256:
            cause = f"the image {config.image} has changed"
        raise RecordError(f"the frames in {request.output} are not the record's: {cause}")
    console.narrate(f"repeated bit for bit: {again.frames} frames")
    _report(again, as_json)


def _report(record: ClipRecord, as_json: bool) -> None:
    if as_json:
        console.print_json(record.summary())
    else:
        print(record.output)


def _resolve_prompt(prompt: str | None) -> str:
    if prompt is None:
        console.narrate(f"no --prompt given, using: {DEFAULT_PROMPT}")
        return DEFAULT_PROMPT
    return read_prompt(prompt)


def _free_name(folder: Path, variant: Variant) -> str:
    """Return a name in the folder that no clip has yet; the folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}; choose another --output-dir") from error
    names = (f"{variant.slug}{suffix}.mp4" for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    return str(next(folder / name for name in names if not (folder / name).exists()))


def _print_slugs(as_json: bool) -> None:
    if as_json:
        console.print_json({variant.slug: variant.summary for variant in VARIANTS.values()})
    else:
        console.print_table(("slug", "what it makes"), [(v.slug, v.summary) for v in VARIANTS.values()])


def _refuse_several_processes() -> None:
    processes = launched_processes()
    if processes > 1:
        raise UsageError(f"torchrun started {processes} processes; this release runs on one device: leave out torchrun")


if __name__ == "__main__":
    main()
