"""What a compiling process may do instead of compiling; imported by name in the process itself."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event as Flag

from causal_forcing.build_engines.plans.job import PlanJob


def crash(job: PlanJob, sender: Connection, cancelled: Flag) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(job: PlanJob, sender: Connection, cancelled: Flag) -> None:
    os._exit(7)


def wait_for_cancel(job: PlanJob, sender: Connection, cancelled: Flag) -> None:
    sender.send(("event", ("start", "Building engine", None, 6)))
    job.layers.write_text(f"asked: {cancelled.wait(60)}")


def hang(job: PlanJob, sender: Connection, cancelled: Flag) -> None:
    sender.send(("event", ("start", "Building engine", None, 6)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
