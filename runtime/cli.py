"""`cf-generate`: a prompt to a video."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from causal_forcing.runtime import console
from causal_forcing.runtime.cli_options import AsJson, Debug, Device, takes_engine_options
from causal_forcing.runtime.clip import make_clip
from causal_forcing.runtime.clip_request import ClipRequest
from causal_forcing.runtime.config import GenerateConfig
from causal_forcing.runtime.engine_lookup import recorded_engine
from causal_forcing.runtime.engine_options import DEFAULT_SLUG, EngineOptions, check_ranks
from causal_forcing.runtime.environment import launched_rank, package_version
from causal_forcing.runtime.errors import RanksEndedError, RecordError, UnknownNameError, UsageError
from causal_forcing.runtime.launch import run_ranks
from causal_forcing.runtime.manifest import read_manifest
from causal_forcing.runtime.rank_process import check_rank_device, left_at_once, run_as_launched
from causal_forcing.runtime.record import ClipRecord, read_record, record_path, recorded_options
from causal_forcing.runtime.text import read_prompt
from causal_forcing.runtime.variant import VARIANTS

# Nothing imported here imports torch: `--help`, `--list` and every refusal must be instant.

DEFAULT_TOTAL_BLOCKS = 7
"""81 frames chunkwise: five seconds, what the released models were trained for."""

OUTPUT_FOLDER = Path("outputs")

GO_WITH_RECORD = (
    *("from_record", "output", "output_dir", "device", "text_encoder", "no_prompt_cache", "as_json", "debug"),
)
"""Options that do not change what a record says of its clip."""

app = typer.Typer(name="cf-generate", add_completion=False)


@app.command(no_args_is_help=True)
@takes_engine_options
def generate(
    options: EngineOptions,
    context: typer.Context,
    text: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text of the clip, as --prompt takes it; several words need no SLUG."),
    ] = None,
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
    fps: Annotated[int | None, typer.Option(min=1, max=240, help="Playback rate. [default: the model's, 16]")] = None,
    engine: Annotated[Path | None, typer.Option(help="Engine directory to use as it is.")] = None,
    device: Device = "auto",
    text_encoder: Annotated[
        str, typer.Option(help="What becomes of the text encoder once the prompt is encoded: free its memory, or keep.")
    ] = "free",
    no_prompt_cache: Annotated[
        bool, typer.Option("--no-prompt-cache", help="Encode the prompt anew, and keep its embedding nowhere.")
    ] = False,
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
    if version or list_slugs:
        console.print_line(package_version()) if version else _print_slugs(as_json)
        return
    options, text, given = _take_positional(options, text, _given(context))
    if from_record is not None:
        _refuse_options_beside_record(given)
        request, record = _repeat_request(from_record, output, output_dir, device if "device" in given else None)
        request = dataclasses.replace(request, text_encoder=text_encoder, prompt_cache=not no_prompt_cache)
        _run(request, context.obj, as_json, record)
        return
    options = _check_together(options, given, engine, endless=endless, total_blocks=total_blocks)
    options = dataclasses.replace(options, context_parallel=_ranks(options, engine))
    prompt = text if prompt is None else prompt
    variant, geometry = options.variant(), options.geometry()
    config = GenerateConfig(
        prompt=variant.default_prompt if prompt is None else read_prompt(prompt),
        seed=seed,
        total_blocks=None if endless else DEFAULT_TOTAL_BLOCKS if total_blocks is None else total_blocks,
        image=image_path,
        image_fit=image_fit,
    )
    if no_instantiate:
        console.print_json({"engine": options, "geometry": geometry, "generate": config, "variant": variant})
        return
    request = ClipRequest(
        options=options,
        generate=config,
        output=output,
        output_dir=output_dir,
        fps=fps or variant.fps,
        device=device,
        engine_folder=engine,
        text_encoder=text_encoder,
        prompt_cache=not no_prompt_cache,
    )
    _run(request, context.obj, as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cf-generate`; as one of several ranks where a launcher's environment variables say so."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program = functools.partial(app, args=words, prog_name="cf-generate", standalone_mode=False, obj=words)
    with left_at_once():
        console.run_program(functools.partial(run_as_launched, program))


def _run(request: ClipRequest, words: Sequence[str], as_json: bool, record: ClipRecord | None = None) -> None:
    """Make the clip: in this process, as one of several ranks, or in ranks that are started for it."""
    place, ranks = launched_rank(), request.options.ranks
    if ranks > 1:
        check_ranks(ranks, request.options.variant())
        check_rank_device(request.device)
    if place is not None and place.ranks != ranks:
        raise UsageError(f"the clip's record has {ranks} ranks, torchrun started {place.ranks}: start as many")
    if place is None and ranks > 1:
        code = run_ranks([sys.executable, "-m", "causal_forcing.runtime.cli", *words], ranks)
        if code:
            raise RanksEndedError(f"the ranks left with {code}", exit_code=code, said=True)
        return
    made = make_clip(request, place)
    if place is None or place.rank == 0:
        _report(made if record is None else _compare(made, record), as_json)


def _ranks(options: EngineOptions, engine: Path | None) -> int | None:
    """Return how many ranks make the clip: what the option says, else torchrun, else the engine that was named."""
    place, given = launched_rank(), options.context_parallel
    if place is not None:
        if given not in (None, place.ranks):
            raise UsageError(
                f"--context-parallel is {given}, torchrun started {place.ranks} processes: give both the same number, "
                "or leave one of them out"
            )
        return given if place.ranks == 1 else place.ranks
    if given is None and engine is not None and engine.is_dir():
        ranks = read_manifest(engine).config.context_parallel
        return ranks if ranks > 1 else None
    return given


def _given(context: typer.Context) -> list[str]:
    """Return the names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _take_positional(
    options: EngineOptions, text: str | None, given: list[str]
) -> tuple[EngineOptions, str | None, list[str]]:
    """Return options, prompt and given names as they are meant: several words alone are a prompt, not a slug."""
    if options.slug in VARIANTS:
        return options, text, given
    if text is None and len(options.slug.split()) != 1:
        names = ["text" if name == "slug" else name for name in given]
        return dataclasses.replace(options, slug=DEFAULT_SLUG), options.slug, names
    advice = "a prompt of one word goes with --prompt" if text is None else ""
    raise UnknownNameError("slug", options.slug, VARIANTS, advice=advice)


def _refuse_options_beside_record(given: list[str]) -> None:
    extra = [_spelling(name) for name in given if name not in GO_WITH_RECORD]
    if extra:
        raise UsageError(f"--from-record repeats a clip as it was: leave out {', '.join(extra)}")


def _check_together(
    options: EngineOptions, given: list[str], engine: Path | None, *, endless: bool, total_blocks: int | None
) -> EngineOptions:
    """Refuse options that exclude each other; an engine that was named says itself of which slug it is."""
    if "text" in given and "prompt" in given:
        raise UsageError("PROMPT excludes --prompt: give one or the other")
    if endless and total_blocks is not None:
        raise UsageError("--endless excludes --total-blocks: give one or the other")
    if engine is not None and (options.checkpoint or options.wan_folder or options.taehv):
        raise UsageError("--engine excludes --checkpoint, --wan-folder and --taehv: an engine holds its weights")
    if engine is not None and "slug" not in given and engine.is_dir():
        return dataclasses.replace(options, slug=read_manifest(engine).config.variant.slug)
    return options


def _spelling(name: str) -> str:
    positional = {"slug": "SLUG", "text": "PROMPT"}
    return positional.get(name) or f"--{name.removesuffix('_slugs').replace('_', '-')}"


def _repeat_request(
    path: Path, output: str | None, output_dir: Path, device: str | None
) -> tuple[ClipRequest, ClipRecord]:
    """Return the request that repeats the clip of a record, and the record."""
    record = read_record(path)
    options, config = recorded_options(record)
    if output and os.path.abspath(record_path(output)) == os.path.abspath(path):
        raise RecordError(f"{output} would replace the clip and record that are to be repeated: name another --output")
    request = ClipRequest(
        options=options,
        generate=config,
        output=output,
        output_dir=output_dir,
        fps=record.fps,
        # Each rank finds its own device of that kind.
        device=device or (record.device if record.ranks == 1 else record.device.partition(":")[0]),
        engine_folder=recorded_engine(record),
        image_sha256=record.image_sha256,
    )
    return request, record


def _compare(again: ClipRecord, record: ClipRecord) -> ClipRecord:
    """Make sure that a repeated clip has the frames of the record."""
    if again.frames_sha256 != record.frames_sha256:
        then = f"engine {record.engine_fingerprint[:16]} on {record.device} then"
        now = f"engine {again.engine_fingerprint[:16]} on {again.device} now"
        raise RecordError(f"the frames in {again.output} are not the record's: {then}, {now}; both clips are kept")
    console.narrate(f"repeated bit for bit: {again.frames} frames")
    return again


def _report(record: ClipRecord, as_json: bool) -> None:
    if as_json:
        console.print_json(record.summary())
    else:
        console.print_line(record.output)


def _print_slugs(as_json: bool) -> None:
    if as_json:
        console.print_json({variant.slug: variant.summary for variant in VARIANTS.values()})
    else:
        console.print_table(("slug", "what it makes"), [(v.slug, v.summary) for v in VARIANTS.values()])


if __name__ == "__main__":
    main()
