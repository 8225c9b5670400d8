"""`cf-build`: make, plan, verify and inspect engines, and examine the machine."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from causal_forcing.runtime import console
from causal_forcing.runtime.cli_options import AsJson, Debug, Device, takes_engine_options
from causal_forcing.runtime.config import EngineOptions, cache_folder, package_version
from causal_forcing.runtime.errors import CausalForcingError, EngineNotFoundError, UnknownNameError, UsageError
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, read_manifest
from causal_forcing.runtime.resolution import default_root, resolve_engine, weights_identity
from causal_forcing.runtime.spec import VARIANTS

if TYPE_CHECKING:
    from causal_forcing.build_engines.builder import BuildJob
    from causal_forcing.build_engines.planner import BuildPlan

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
        _print_plan(outcome)


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
        console.print_table(
            ("network", "output", "engine", "beside", "max error", "mean error", "cosine", "PSNR", "result"),
            [
                (
                    c.network,
                    c.output,
                    c.engine,
                    c.reference,
                    f"{c.max_error:.2e}",
                    f"{c.mean_error:.2e}",
                    f"{c.cosine:.6f}",
                    "same" if c.psnr_db is None else f"{c.psnr_db:.1f} dB",
                    c.verdict,
                )
                for c in comparisons
            ],
        )
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
    console.print_table(("field", "value"), summary["config"].items())
    console.print_line("")
    console.print_table(
        ("network", "file", "size", "inputs", "outputs", "operators"),
        [
            (row["network"], row["file"], _size(row["bytes"]), row["inputs"], row["outputs"], row["operators"])
            for row in summary["networks"]
        ],
    )
    plans = [row["plan"] for row in summary["networks"] if row["plan"]]
    if plans:
        console.print_line("")
        _print_plans(plans)


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
    from causal_forcing.build_engines.builder import network_names

    config = job.config
    console.narrate(f"building {config.variant.slug} for {config.backend} ({reason}), {config.precision}")
    with BuildDisplay(network_names(config.variant)) as display:
        manifest = build_engine(job, folder, progress=display.export, plan_progress=display.compile)
    size_bytes = sum(entry.bytes for entry in manifest.files.values())
    console.narrate(f"built in {manifest.build['seconds']} s, {_size(size_bytes)}")


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
        engines = [engine for engine in (report.engine, report.reference) if engine is not None]
        console.print_table(
            ("engine", "clips", *(name for name, _ in report.engine.scores.items()), "steady fps", "PSNR"),
            [
                (
                    engine.name,
                    len(cases),
                    *(f"{share.fraction:.1%}" for _, share in engine.scores.items()),
                    f"{engine.steady_fps:.1f}",
                    f"{report.psnr_db:.1f} dB" if engine is report.engine and report.psnr_db is not None else None,
                )
                for engine in engines
            ],
        )
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


def _print_plan(outcome: BuildPlan) -> None:
    console.print_table(
        ("network", "weights", "action"),
        [(name, _size(size), "reuse" if outcome.reuse else "build") for name, size in outcome.networks.items()],
    )
    free = shutil.disk_usage(_existing(outcome.folder)).free
    console.print_line(f"{'reuse' if outcome.reuse else 'build'}: {outcome.reason}")
    console.print_line(f"folder: {outcome.folder}")
    console.print_line(f"disk: {_size(sum(outcome.networks.values()))} of weights, {_size(free)} free")
    console.print_line(f"memory of a session's buffers: {_size(outcome.buffer_bytes)}")
    for download in outcome.downloads:
        state = "cached" if download.cached else "to download"
        console.print_line(f"{state}: {download.repo}@{download.revision[:12]} {download.filename}")


def _print_plans(plans: list[dict[str, Any]]) -> None:
    from causal_forcing.build_engines.plans.job import HEAVY_LAYERS

    headers = ("network", "layers", "arithmetic in", "aliases", "io_tensors", "of it caches", "plan", "activations")
    rows = []
    for plan in plans:
        memory, engine = plan["memory"], plan["engine"]
        heavy = {kind: count for kind, count in plan["precisions"].items() if kind.split()[0] in HEAVY_LAYERS}
        arithmetic = ", ".join(f"{kind} {count}" for kind, count in heavy.items())
        sizes = (_size(memory[name]) for name in ("io_tensor_bytes", "cache_bytes", "plan_bytes"))
        activations = _size(engine["activation_bytes"]) if engine else "known on the GPU"
        rows.append((plan["network"], len(plan["layers"]), arithmetic, len(plan["aliases"]), *sizes, activations))
    console.print_table(headers, rows)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
