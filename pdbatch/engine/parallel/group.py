"""Sums and gathers over the ranks of one engine: NCCL on GPUs, gloo on the CPU.

All ranks call the same operations in the same order. On a GPU they are launched on the current
stream and waited for by nobody here, so they may stand in a captured graph. Several groups may
live in one process: torch's default group is not used.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 300.0
"""A rank waits so long for the others in one operation: longer than any compilation."""


class Group:
    """One rank's end. Used by one thread, except `abort`."""

    def __init__(
        self, meeting: Path, rank: int, size: int, device: torch.device, limit_s: float = LIMIT_S
    ) -> None:
        """Meets the other ranks at a file that does not exist yet. Raises RuntimeError."""
        self.rank = rank
        self.size = size
        self.device = device
        import torch.distributed

        dist: Any = torch.distributed
        c10d: Any = dist.distributed_c10d
        limit = timedelta(seconds=limit_s)
        store = dist.FileStore(str(meeting), size)
        store.set_timeout(limit)
        self._group: Any = _nccl(dist, store, self, limit)
        if device.type == "cpu":
            self._group = _gloo(dist, store, self, limit)
        self._sum_options = c10d.AllreduceOptions()
        self._broadcast_options = c10d.BroadcastOptions()
        self._gather_options = c10d.AllgatherOptions()
        for options in (self._sum_options, self._broadcast_options, self._gather_options):
            if hasattr(options, "asyncOp"):
                options.asyncOp = False

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; bit for bit the same everywhere."""
        _wait(self._group.allreduce([x], self._sum_options))
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks, *x.shape]: every rank's tensor, all of one shape."""
        flat = x.reshape(-1)
        out = x.new_empty(self.size * flat.numel())
        _wait(self._group._allgather_base(out, flat, self._gather_options))
        return out.view(self.size, *x.shape)

    def broadcast_(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's content, in place."""
        self._broadcast_options.rootRank = 0
        self._broadcast_options.rootTensor = 0
        _wait(self._group.broadcast([x], self._broadcast_options))
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers; waits for all of them."""
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        return int(self.gather(mine).min())

    def close(self) -> None:
        """The other ranks have gone: let nothing wait for them."""
        if self.device.type != "cpu":
            self.abort()

    def abort(self) -> None:
        """End what is under way, which then gives no result of use; from any thread."""
        end = getattr(self._group, "abort", None)  # torch's versions differ
        if end is not None:
            end()


def _gloo(dist: Any, store: Any, group: Group, limit: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = limit
    return dist.ProcessGroupGloo(store, group.rank, group.size, options)


def _nccl(dist: Any, store: Any, group: Group, limit: timedelta) -> Any:
    if group.device.type == "cpu":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    with torch.cuda.device(group.device):
        made = dist.ProcessGroupNCCL(store, group.rank, group.size, options)
        made.eager_connect_single_device(group.device)  # else the first sum would connect
    return made


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
