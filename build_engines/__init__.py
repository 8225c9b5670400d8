"""Checkpoints to engines: torch modules, their export, and the engine directory.

    from causal_forcing.build_engines import build, make_job
    from causal_forcing.runtime import EngineOptions

    build(make_job(EngineOptions(slug="tiny")), folder)

The names in `__all__` are the public ones, imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from causal_forcing.build_engines.builder import BuildJob, build
    from causal_forcing.build_engines.planner import BuildPlan, make_job, plan_build
    from causal_forcing.build_engines.verification import OutputComparison, verify

__all__ = ["BuildJob", "BuildPlan", "OutputComparison", "build", "make_job", "plan_build", "verify"]

_HOMES = {
    "builder": ("BuildJob", "build"),
    "planner": ("BuildPlan", "make_job", "plan_build"),
    "verification": ("OutputComparison", "verify"),
}

if not TYPE_CHECKING:  # a checker that saw it would take any name for public

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                from importlib import import_module

                return getattr(import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
