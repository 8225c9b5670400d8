"""Combine pieces of tiles on the CPU, through Triton's interpreter, with the schedule in plain Python.

A process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined, its own library's included. Ends
with an AssertionError where a result is wrong.
"""

from __future__ import annotations

import os
import random
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from causal_forcing.plugins.kernels import hopper_schedule
from causal_forcing.plugins.kernels.hopper_combine import combine_kernel

TILE, D, LINES = 128, 128, 64


def schedule_in_python() -> dict[str, Any]:
    """Return the functions of the schedule over Python's integers."""
    integers = types.SimpleNamespace(minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b)
    functions: dict[str, Any] = {"gl": integers}
    for name in ("units_before", "tile_of", "count_rounds", "run_start", "plan_program", "find_part"):
        code = getattr(hopper_schedule, name).fn.__code__
        functions[name] = types.FunctionType(code, functions, name)
    return functions


def check(*, programs: int, heads: int, tokens: int, blocks: list[int]) -> int:
    """Work through a schedule and combine its pieces; return by how many units programs differ in work."""
    functions = schedule_in_python()
    row_tiles = -(-tokens // TILE)
    segment_tiles, segments = row_tiles * heads, len(blocks)
    sizes = (segment_tiles, segment_tiles * segments, blocks[-1], blocks[0])
    done: dict[tuple[int, int], int] = {}
    pieces = torch.full((programs * 2 * TILE, D), torch.nan)
    statistics = torch.full((programs * 2 * TILE, 2), torch.nan)
    slots: dict[int, list[int]] = {}
    work = []
    schedule = torch.empty(3 + programs + 1, dtype=torch.int32)
    for program in range(programs):
        plan = functions["plan_program"](program, programs, sizes)
        schedule[:3] = torch.tensor([plan[2], blocks[-1], blocks[0]])
        schedule[3 + program], schedule[4 + program] = plan[3], plan[4]
        for part in range(plan[5]):
            tile, first, last, count = functions["find_part"](part, plan, sizes)
            assert 0 <= first < last <= count == blocks[-1 if tile < segment_tiles else 0]
            for block in range(first, last):
                assert (tile, block) not in done, "a unit is worked on twice"
                done[tile, block] = program
            if last - first < count:
                slot = program * 2 + (first == 0)
                lines = slice(slot * TILE, (slot + 1) * TILE)
                assert statistics[lines].isnan().all(), "a program has two pieces for one slot"
                pieces[lines] = torch.randn(TILE, D)
                statistics[lines] = torch.rand(TILE, 2) + torch.tensor([0.0, 1.0])
                slots.setdefault(tile, []).append(slot)
        work.append(sum(owner == program for owner in done.values()))
    assert len(done) == segment_tiles * sum(blocks), "a unit is missing"

    out = torch.full((segments * tokens, heads, D), torch.nan)
    want = out.clone()
    for tile, own in slots.items():
        top, total = statistics.view(-1, TILE, 2)[own].double().unbind(-1)
        weighted = (pieces.view(-1, TILE, D)[own].double() * top.exp2()[..., None]).sum(0)
        segment, head, row = (
            segments - 1 - tile // segment_tiles,
            tile % segment_tiles // row_tiles,
            tile % row_tiles * TILE,
        )
        rows = min(TILE, tokens - row)
        result = (weighted / (total * top.exp2()).sum(0)[:, None])[:rows]
        want[segment * tokens + row : segment * tokens + row + rows, head] = result.float()
    shared = segment_tiles * segments - segment_tiles // programs * programs
    combine_kernel[(max(shared, 1), TILE // LINES)](
        *(schedule, out, pieces, statistics, statistics, programs, tokens, row_tiles, heads, D, heads * D),
        **{"SEGMENTS": segments, "FP8": False, "LINES": LINES, "TILE": TILE, "D": D, "MAX_PROGRAMS": 256},
    )
    torch.testing.assert_close(out, want, equal_nan=True)
    return max(work) - min(work)


if __name__ == "__main__":
    torch.manual_seed(0)
    draw = random.Random(0)
    for _ in range(8):
        check(
            programs=draw.choice([3, 7, 16]),
            heads=draw.randint(1, 3),
            tokens=draw.randint(1, 300),
            blocks=[draw.randint(1, 12) for _ in range(draw.randint(1, 2))],
        )
    assert check(programs=11, heads=1, tokens=1560, blocks=[32]) <= 1, "work is uneven"
    assert check(programs=11, heads=1, tokens=1560, blocks=[20, 32]) <= 1, "work is uneven"
