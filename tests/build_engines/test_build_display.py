"""How a build shows how far it is, without and with a terminal; and the tree of phases behind it."""

from __future__ import annotations

import io
import re
import sys

import pytest

from causal_forcing.build_engines.build_display import BuildDisplay
from causal_forcing.build_engines.plans.progress import ProgressTree

EVENTS = [
    ("start", "Building engine", None, 6),
    ("step", "Building engine", 1),
    ("start", "Optimizing graph", "Building engine", 3),
    ("start", "Timing graph nodes", "Optimizing graph", 40),
    ("step", "Timing graph nodes", 7),
]


@pytest.fixture
def tree() -> ProgressTree:
    tree = ProgressTree()
    for event in EVENTS:
        tree.take(event)
    return tree


def test_tree_nests_phases_in_their_parents_and_counts_their_steps(tree: ProgressTree) -> None:
    assert [(depth, phase.name, phase.done, phase.steps) for depth, phase in tree.rows()] == [
        (0, "Building engine", 1, 6),
        (1, "Optimizing graph", 0, 3),
        (2, "Timing graph nodes", 7, 40),
    ]
    assert tree.line() == "Building engine 1/6 > Optimizing graph 0/3 > Timing graph nodes 7/40"


def test_finished_phase_leaves_the_tree_with_its_children(tree: ProgressTree) -> None:
    tree.take(("finish", "Optimizing graph"))
    assert tree.line() == "Building engine 1/6"
    tree.take(("finish", "Building engine"))
    assert tree.line() == ""


def test_step_of_a_phase_that_nobody_started_changes_nothing(tree: ProgressTree) -> None:
    before = tree.line()
    tree.take(("step", "Refitting", 3))
    assert tree.line() == before


def test_without_a_terminal_a_line_is_written_now_and_then(
    tree: ProgressTree, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    with BuildDisplay(["prompt_kv", "dit_step"], clock=lambda: now_s) as display:
        display.export("dit_step")
        display.compile("dit_step", tree)
        now_s = 1.0
        display.compile("dit_step", tree)
        now_s = 2.5
        display.compile("dit_step", tree)
    assert capsys.readouterr().err.splitlines() == [
        "[2/2] dit_step",
        "[2/2] dit_step: compiling",
        f"[2/2] dit_step: {tree.line()}",
    ]


def test_on_a_terminal_every_phase_is_a_bar_below_its_parent(
    tree: ProgressTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    now_s = 0.0
    with BuildDisplay(["dit_step"], clock=lambda: now_s) as display:
        display.compile("dit_step", tree)
        now_s = 1.0
        display.compile("dit_step", tree)
        assert display._live is not None
        display._live.refresh()
        drawn = terminal.getvalue()
        tree.take(("finish", "Optimizing graph"))
        now_s = 2.0
        display.compile("dit_step", tree)
        assert [task.visible for task in display._live.tasks] == [True, False, False]
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    # Counts are a column of five; a phase begins two columns to the right of its parent.
    for count, indent, name in (
        ("1/6  ", 0, "Building engine"),
        ("0/3  ", 2, "Optimizing graph"),
        (" 7/40", 4, "Timing"),
    ):
        assert f" {count} {' ' * indent}{name}" in plain
