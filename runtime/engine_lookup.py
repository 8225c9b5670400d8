"""The engine directory that a clip needs: the one that is there, or one that `cf-build` makes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

from causal_forcing.runtime import console
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import (
    CausalForcingError,
    EngineDamagedError,
    EngineMismatchError,
    EngineNotFoundError,
)
from causal_forcing.runtime.launch import environment_without_ranks
from causal_forcing.runtime.manifest import read_manifest
from causal_forcing.runtime.record import ClipRecord
from causal_forcing.runtime.resolution import default_root, resolve_engine, weights_identity

BUILD_STOP_S = 30.0
"""How long a build that was asked to stop may take to clean up."""
SIGNAL_POLL_S = 0.5
"""How often a program that waits for a build looks for signals."""


def find_or_build(options: EngineOptions, device: str) -> Path:
    """Return the directory of the engine for these options, building it where it is not there.

    The build runs in a process of its own: this program loads no model code and keeps none of its memory.

    Raises:
        CausalForcingError: The build failed; it has said why.
    """
    weights = weights_identity(options)
    if weights is not None:
        folder = resolve_engine(options, weights=weights, device=device).folder(default_root())
        try:
            read_manifest(folder)
        except EngineNotFoundError:
            console.narrate(f"no engine for {options.slug} with these options yet: building it once")
        except (EngineDamagedError, EngineMismatchError):
            pass  # the build says what is wrong with the one that is there
        else:
            return folder
    return build_engine(options, device)


def recorded_engine(record: ClipRecord) -> Path | None:
    """Return the engine directory that made a record's clip, if it is still there and the same."""
    folder = Path(record.engine)
    try:
        same = read_manifest(folder).config.fingerprint() == record.engine_fingerprint
    except CausalForcingError:
        return None
    return folder if same else None


def build_engine(options: EngineOptions, device: str) -> Path:
    """Run `cf-build`, and pass a stop on to it: it removes what it has begun.

    Raises:
        CausalForcingError: The build failed; it has said why.
    """
    command = [sys.executable, "-m", "causal_forcing.build_engines.cli", *_build_arguments(options)]
    # In a group of its own, Ctrl-C reaches the build once, through this program, however it came.
    build = subprocess.Popen(
        [*command, "--device", device, "--json"],
        env=environment_without_ranks(),
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        result = _output_of(build)
    except BaseException:
        console.narrate("stopping the build")
        build.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            build.wait(BUILD_STOP_S)
        build.kill()
        raise
    if build.returncode:
        failure = CausalForcingError(f"the engine could not be built: cf-build {options.slug} failed, see above")
        failure.exit_code, failure.said = build.returncode, True
        if build.returncode < 0:  # nobody had the time to say so
            name = signal.Signals(-build.returncode).name
            failure = CausalForcingError(f"the build was killed by {name}: is there enough memory? run it again")
            failure.exit_code = 3
        raise failure
    return Path(json.loads(result)["engine"])


def _output_of(build: subprocess.Popen[str]) -> str:
    """Wait for a build, and see to signals meanwhile: one that another thread received ends no system call here."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return build.communicate(timeout=SIGNAL_POLL_S)[0]


def _build_arguments(options: EngineOptions) -> list[str]:
    arguments = [options.slug]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "slug" and value is not None:
            values = value if isinstance(value, list) else (value,)
            arguments += [f"--{field.name.replace('_', '-')}={one}" for one in values]
    return arguments
