"""A program as one of the ranks that a launcher started: who talks, who hears signals, and how it leaves.

No framework is imported here: what can be refused without one is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from causal_forcing.runtime import console
from causal_forcing.runtime.config import op_digest
from causal_forcing.runtime.environment import (
    EXCHANGE_VARIABLE,
    LaunchedRank,
    launched_rank,
    package_version,
    rank_exchange,
)
from causal_forcing.runtime.errors import BackendUnavailableError, RanksEndedError, UsageError
from causal_forcing.runtime.interruption import heeded

if TYPE_CHECKING:
    from causal_forcing.runtime.clip_request import ClipRequest


def run_as_launched(program: Callable[[], object]) -> object:
    """Run a program, on ranks other than 0 without a word; rank 0 tells what they refuse.

    Raises:
        RanksEndedError: In place of any error on ranks other than 0.
    """
    place = _place()
    if place is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost peers repeat what we say
    if place is None or place.rank == 0:
        return program()
    _leave_signals_to_rank_0()
    with console.hushed():
        try:
            return program()
        except (SystemExit, RanksEndedError):
            raise
        except BaseException as error:
            _, code = console.explain(error)
            if code:
                from causal_forcing.runtime.process_group import refuse

                refuse(place, error)
            raise RanksEndedError("refused", exit_code=code, said=True) from error


def check_rank_device(device: str) -> None:
    """Check that a device can be asked for where each rank takes one of its own.

    Raises:
        UsageError: It is one GPU.
    """
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device} is one GPU, and each rank takes its own: use --device cuda")


@contextlib.contextmanager
def chosen_exchange() -> Iterator[None]:
    """Let ranks hand each other data inside as the user chose.

    Raises:
        BackendUnavailableError: This machine does not let them.
    """
    from causal_forcing.plugins.ranks import exchanging_by_stores
    from causal_forcing.plugins.symmetric_buffer import MemoryNotMappedError

    try:
        with exchanging_by_stores(rank_exchange() == "stores"):
            yield
    except MemoryNotMappedError as error:
        raise BackendUnavailableError(f"{error}: unset {EXCHANGE_VARIABLE}, and they use collectives") from error


def decisive(request: ClipRequest, image_sha256: str | None) -> dict[str, object]:
    """Return what decides a clip, by the names that the user knows; paths as the ranks were given them."""
    given = dataclasses.asdict(request.options) | dataclasses.asdict(request.generate)
    given |= {"engine": request.engine_folder, "device": request.device, "no_prompt_cache": not request.prompt_cache}
    options = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    options |= {
        "SLUG": options.pop("--slug"),
        EXCHANGE_VARIABLE: rank_exchange(),
        "the image": image_sha256,
        "the version of this program": f"{package_version()}-{op_digest()}",
    }
    plain: dict[str, object] = json.loads(json.dumps(options, default=str))
    return plain


@contextlib.contextmanager
def left_at_once() -> Iterator[None]:
    """Leave the process by an exit inside without winding anything up, where torch could be blocked in that."""
    try:
        yield
    except SystemExit as leaving:
        group = sys.modules.get("causal_forcing.runtime.process_group")
        if group is not None and group.must_exit_at_once():
            console.flush()
            os._exit(leaving.code if isinstance(leaving.code, int) else 0)
        raise


def _place() -> LaunchedRank | None:
    try:
        place = launched_rank()
    except UsageError:  # said when a clip is asked for; `--help` works anywhere
        return None
    return place if place is not None and place.ranks > 1 else None


def _leave_signals_to_rank_0() -> None:
    """Leave without a word at a stop: there is nothing to clean up yet, and Ctrl-C is for rank 0."""
    for number in heeded():
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
