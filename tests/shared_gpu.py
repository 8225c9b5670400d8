"""Ranks that share one GPU, which neither NCCL nor symmetric memory allows by itself: for tests on one GPU."""

from __future__ import annotations

import os
from unittest import mock

from causal_forcing.plugins import ranks


def share_gpu(rank: int) -> None:
    """Let this process, one of several ranks, use a GPU that others use; before it makes a process group.

    NCCL takes each rank for a machine of its own, and sends through sockets.
    """
    os.environ["NCCL_HOSTID"] = f"machine of rank {rank}"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    mock.patch.object(ranks, "reach_each_other", return_value=True).start()  # no GPU is a peer of itself
