"""`cf-build`: make, plan, verify and inspect engines, and examine the machine."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from causal_forcing.build_engines import cli_tables as tables
from causal_forcing.runtime import console
from causal_forcing.runtime.cli_options import AsJson, Debug, Device, takes_engine_options
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.environment import cache_folder, package_version
from causal_forcing.runtime.errors import CausalForcingError, EngineNotFoundError, UnknownNameError, UsageError
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, read_manifest
from causal_forcing.runtime.resolution import default_root, resolve_engine, weights_identity
from causal_forcing.runtime.variant import VARIANTS

if TYPE_CHECKING:
    from causal_forcing.build_engines.builder import BuildJob

# Commands import what they need when they run: `--help` and `doctor` must not wait for torch.

COMMANDS = ("build", "plan", "verify", "inspect", "doctor")

app = typer.Typer(
    name="cf-build",
    add_completion=False,
    no_args_is_help=True,
    help="Build engines. `cf-build SLUG` is short for `cf-build build SLUG`; for slugs see `cf-generate --list`.",
)

Output = Annotated[
    Path | None, typer.Option("--output", help="Folder to keep engines in; by default below the cache folder.")
]


@app.command()
@takes_engine_options
def build(
    options: EngineOptions,
    output: Output = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Build even if the engine is there.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build the engine of a slug, unless it is there already, and print its folder."""
    resolve_engine(options, weights="", device=device, for_build=True)  # a wrong option is found before torch is loaded
    from causal_forcing.build_engines.planner import make_job
    from causal_forcing.runtime.backends import choose_backend

    job = make_job(options, device=device)
    folder = job.config.folder(output or default_root())
    reused = not force and _is_usable(folder)
    if not reused:
        _, reason = choose_backend(options.backend, device, for_build=True)
        _build(job, folder, reason)
    if as_json:
        console.print_json({"engine": folder, "reused": reused, "fingerprint": job.config.fingerprint()})
    else:
        console.print_line(folder)


@app.command()
@takes_engine_options
def plan(
    options: EngineOptions,
    output: Output = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a build would do and why, and what it needs; nothing is written or downloaded."""
    resolve_engine(options, weights="", device=device, for_build=True)
    from causal_forcing.build_engines.planner import plan_build

    outcome = plan_build(options, output or default_root(), device=device)
    if as_json:
        console.print_json(outcome.summary())
    else:
        tables.print_plan(outcome)


@app.command()
@takes_engine_options
def verify(
    options: EngineOptions,
    output: Output = None,
    device: Device = "auto",
    quality: Annotated[
        bool, typer.Option("--quality", help="Compare what the clips show with the reference engine's: torch, fp32.")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option("--prompts", help="With --quality: how many held-out prompts to make clips of; 48.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare every engine of a slug with the torch module it was made from, output by output."""
    if prompts is not None and not quality:
        raise UsageError("--prompts is for --quality: add it, or leave out --prompts")
    resolve_engine(options, weights="", device=device, for_build=True)
    if quality:
        _verify_quality(options, output or default_root(), device, prompts, as_json=as_json)
        return
    from causal_forcing.build_engines.planner import make_job
    from causal_forcing.build_engines.verification import verify as compare

    _require_engine(options, output or default_root(), device)
    job = make_job(options, device=device)
    comparisons = list(compare(job, job.config.folder(output or default_root()), device=device))
    if as_json:
        console.print_json([dataclasses.asdict(comparison) for comparison in comparisons])
    else:
        tables.print_comparisons(comparisons)
    if job.config.plan is not None and not any(c.engine.startswith(job.config.backend) for c in comparisons):
        console.warn(f"the plans were not executed: {job.config.backend} runs on none of this machine's devices")
    failed = sum(not comparison.passed for comparison in comparisons)
    console.narrate(f"{len(comparisons) - failed} of {len(comparisons)} outputs within tolerance")
    if failed:
        raise typer.Exit(1)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Engine directory, as `cf-build SLUG` prints it.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what an engine directory holds, and check its files."""
    from causal_forcing.build_engines.inspection import inspect_engine

    summary = inspect_engine(folder)
    if as_json:
        console.print_json(summary)
        return
    tables.print_engine(summary)


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Examine this machine: what can build and run engines, and what to install."""
    from causal_forcing.runtime.doctor import TABLE_HEADERS, examine, report_json, report_rows

    report = examine(cache_folder())
    if as_json:
        console.print_json(report_json(report))
    else:
        console.print_table(TABLE_HEADERS, report_rows(report.probes))
        console.print_line("\n" + "\n".join(map(str, report.commands)))
    if not report.usable:
        raise typer.Exit(3)


def _build(job: BuildJob, folder: Path, reason: str) -> None:
    """Build an engine directory and say how far it is."""
    from causal_forcing.build_engines.build_display import BuildDisplay
    from causal_forcing.build_engines.builder import build as build_engine
    from causal_forcing.build_engines.builder import has_pair, network_names

    config = job.config
    console.narrate(f"building {config.variant.slug} for {config.backend} ({reason}), {config.precision}")
    with BuildDisplay(network_names(config.variant, with_pair=has_pair(config))) as display:
        manifest = build_engine(job, folder, progress=display.export, plan_progress=display.compile)
    size_bytes = sum(entry.bytes for entry in manifest.files.values())
    console.narrate(f"built in {manifest.build['seconds']} s, {tables.size(size_bytes)}")


def _verify_quality(options: EngineOptions, root: Path, device: str, prompts: int | None, *, as_json: bool) -> None:
    """Compare what clips show with what the reference engine's show."""
    from causal_forcing.build_engines.planner import make_job
    from causal_forcing.build_engines.quality import (
        check_measurable,
        choose_cases,
        compare_quality,
        reference_options,
    )

    check_measurable(options)
    cases = choose_cases(prompts)
    resolve_engine(options, weights="", device=device)  # clips are made here: the backend must run here
    _require_engine(options, root, device)
    folder = make_job(options, device=device).config.folder(root)
    job = make_job(reference_options(options), device=device)
    reference = job.config.folder(root)
    if folder == reference:
        console.narrate("this engine is the reference: its scores are compared with the wanted ones")
    elif not _is_usable(reference):
        _build(job, reference, "the reference")
    report = compare_quality(folder, reference, cases, device=device, progress=console.narrate)
    if as_json:
        console.print_json(report)
    else:
        tables.print_quality(report, clips=len(cases))
    if report.reference is not None and report.reference_misses:
        console.warn(f"the reference itself is not good enough: {'; '.join(report.reference_misses)}")
    for failure in report.failures:
        console.narrate(f"not good enough: {failure}")
    if report.failures:
        raise typer.Exit(1)
    console.narrate("as good as the reference" if report.reference else "no wanted score is missed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cf-build`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    entry: Callable[[], object]
    if words == ["--version"]:
        words = []
        entry = functools.partial(console.print_line, package_version())
    else:
        entry = functools.partial(_run_command, words)
    console.run_program(entry)


def _run_command(words: list[str]) -> object:
    """Run a command; a slug in its place means `build`."""
    if words and words[0] not in (*COMMANDS, "--help"):
        if words[0] not in VARIANTS and not words[0].startswith("-"):
            raise UnknownNameError("command or slug", words[0], (*COMMANDS, *VARIANTS))
        words = ["build", *words]
    return app(args=words, prog_name="cf-build", standalone_mode=False)


def _require_engine(options: EngineOptions, root: Path, device: str) -> None:
    """Find out whether an engine is there before its weights are looked for, which may mean a long download."""
    weights = weights_identity(options)
    if weights is None:
        return
    config = resolve_engine(options, weights=weights, device=device, for_build=True)
    folder = config.folder(root)
    if not (folder / MANIFEST_NAME).exists():
        where = f" --output {shlex.quote(str(root))}" if root != default_root() else ""
        raise EngineNotFoundError(f"no engine in {folder}: build it: {config.build_command()}{where}")


def _is_usable(folder: Path) -> bool:
    """Return whether an engine is there, readable and whole; say why not where one is there."""
    try:
        check_files(folder, read_manifest(folder))
    except EngineNotFoundError:
        return False
    except CausalForcingError as error:
        console.warn(f"building again: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
