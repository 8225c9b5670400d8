"""Tapes: what is written is what is read, and when a tensor may be let go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.tape import Call, Tape, Weight, read_tape, tensor_names


def tensor(name: str) -> dict[str, str]:
    return {"tensor": name}


def call(*arguments: Any, results: tuple[str | None, ...], **keywords: Any) -> Call:
    return Call(operator="aten.cat.default", arguments=arguments, keywords=keywords, results=results)


TAPE = Tape(
    weight_file="dit.safetensors",
    inputs=("x", "cache"),
    weights={"w": Weight(key="0000"), "c": Weight(key="0001", channels_last=True)},
    calls=(
        call([tensor("x"), tensor("w")], -1, results=("a",)),
        call(tensor("a"), 1.5, True, None, results=("b", None, "d"), dtype={"dtype": "float32"}),
        call(tensor("b"), tensor("cache"), results=("e",), mask=tensor("c"), device={"device": None}),
    ),
    outputs=(tensor("e"), tensor("d"), tensor("cache")),
    captured=True,
)


def test_tape_written_and_read_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.tape.json"
    TAPE.write(path)
    read = read_tape(path)
    again = tmp_path / "b.tape.json"
    read.write(again)
    assert again.read_bytes() == path.read_bytes()
    assert read.inputs == TAPE.inputs
    assert read.weights == TAPE.weights
    assert [step.operator for step in read.calls] == [step.operator for step in TAPE.calls]
    assert [step.results for step in read.calls] == [("a",), ("b", None, "d"), ("e",)]
    assert read.calls[1].keywords == {"dtype": {"dtype": "float32"}}
    assert read.calls[1].arguments == (tensor("a"), 1.5, True, None)
    assert (read.outputs, read.captured) == (TAPE.outputs, True)


@pytest.mark.parametrize("number", [1e-6, 0.08838834764831845, -(2**53), 1e308, 128**-0.5])
def test_number_of_a_tape_is_read_to_the_last_bit(number: float, tmp_path: Path) -> None:
    path = tmp_path / "a.tape.json"
    tape = Tape(
        weight_file="", inputs=(), weights={}, calls=(call(number, results=(None,)),), outputs=(), captured=False
    )
    tape.write(path)
    assert read_tape(path).calls[0].arguments == (number,)


def test_tensor_is_released_after_the_last_call_that_reads_it() -> None:
    assert TAPE.last_reads() == [(), ("a",), ("b",)]


def test_result_that_nothing_reads_is_released_at_once_and_what_the_engine_owns_never() -> None:
    tape = Tape(
        weight_file="",
        inputs=("x",),
        weights={"w": Weight(key="0")},
        calls=(call(tensor("x"), tensor("w"), results=("a", "b")), call([[tensor("b")]], results=("c",))),
        outputs=(tensor("c"),),
    )
    assert tape.last_reads() == [("a",), ("b",)]


def test_last_reads_of_every_tensor_come_after_all_its_readers() -> None:
    """Play the names alone: every one that is read is there, and at the end only what lives on is left."""
    alive = set(TAPE.inputs) | set(TAPE.weights)
    for step, released in zip(TAPE.calls, TAPE.last_reads(), strict=True):
        assert set(tensor_names([list(step.arguments), list(step.keywords.values())])) <= alive
        alive |= {name for name in step.results if name is not None}
        alive -= set(released)
    assert alive == {"x", "cache", "w", "c", "e", "d"}


def test_tensor_names_are_found_at_any_depth_and_nothing_else_is_one() -> None:
    value = [1, "x", None, {"dtype": "float32"}, tensor("a"), [tensor("b"), (tensor("c"), [])]]
    assert list(tensor_names(value)) == ["a", "b", "c"]


@pytest.mark.parametrize("key", ["weight_file", "inputs", "weights", "calls", "outputs", "captured"])
def test_tape_without_a_part_says_what_to_do(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tape.json"
    TAPE.write(path)
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(EngineDamagedError, match=rf"a\.tape\.json is not a readable tape .*{key}.*with cf-build"):
        read_tape(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights", [1]), ("weights", {"w": {"other": 1}}), ("calls", [1]), ("calls", [{}]), ("calls", 3), ("inputs", 3)],
    ids=str,
)
def test_tape_of_another_form_says_what_to_do(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tape.json"
    TAPE.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(EngineDamagedError, match="rebuild it with cf-build"):
        read_tape(path)
