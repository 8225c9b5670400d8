"""Who makes a clip together, in one process; what several hand each other is in `test_context_parallel.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from causal_forcing.plugins.ranks import ProcessGroup, current_ranks, decoding_ranks, rehearse


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Have a default process group of this process alone; it meets itself at a file."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def decoding_group() -> dist.ProcessGroup:
    ranks = decoding_ranks(1)
    assert isinstance(ranks, ProcessGroup)
    assert ranks.group is not None
    assert torch.equal(ranks.gather(torch.ones(2)), torch.ones(1, 2))
    return ranks.group


def test_decoder_has_one_process_group_of_its_own(tmp_path: Path) -> None:
    with alone(tmp_path / "store"):
        assert current_ranks(1) == ProcessGroup(index=0, size=1)
        group = decoding_group()
        assert group is not dist.group.WORLD
        assert decoding_group() is group


def test_decoder_gets_another_group_with_another_default_one(tmp_path: Path) -> None:
    groups = []
    for name in ("first", "second"):
        with alone(tmp_path / name):
            groups.append(decoding_group())
    assert groups[0] is not groups[1]


def test_decoder_rehearses_as_passes_do() -> None:
    with rehearse(3):
        assert decoding_ranks(3) == current_ranks(3)
        assert decoding_ranks(3).index == 0
