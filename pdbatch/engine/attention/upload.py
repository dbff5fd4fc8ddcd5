"""Numbers of a step on their way to the device: one pinned buffer, one copy.

Two buffers take turns, and one is written again only when its copy has ended; so the host may
prepare a step while the one before it still runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]

_ALIGN = 16
"""Sections begin at multiples of so many numbers (64 bytes)."""


def aligned(count: int) -> int:
    """Numbers that a section of `count` takes in the buffer."""
    return -(-count // _ALIGN) * _ALIGN


def views(buffer: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Sections of these sizes in a buffer."""
    found, at = [], 0
    for size in sizes:
        found.append(buffer[at : at + size])
        at += aligned(size)
    return found


class Upload:
    """Sends sections of int32 to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned = device.type == "cuda"
        self._hosts = [self._make(1 << 16), self._make(1 << 16)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, sections: Sequence[Ints]) -> list[torch.Tensor]:
        """All sections to fresh memory on the device; flat views of it."""
        sizes = [len(section) for section in sections]
        into = torch.empty(sum(map(aligned, sizes)), dtype=torch.int32, device=self.device)
        self.send_into(sections, into)
        return views(into, sizes)

    def send_into(self, sections: Sequence[Ints], into: torch.Tensor) -> None:
        """All sections to the places that `views` names for their sizes."""
        total = sum(aligned(len(section)) for section in sections)
        host = self._host(total)
        numbers, at = host.numpy(), 0
        for section in sections:
            numbers[at : at + len(section)] = section
            at += aligned(len(section))
        into[:total].copy_(host[:total], non_blocking=True)
        if self._pinned:
            event = self._events[self._turn]
            event = event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events[self._turn] = event

    def _host(self, need: int) -> torch.Tensor:
        self._turn ^= 1
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        if self._hosts[self._turn].numel() < need:
            self._hosts[self._turn] = self._make(need + need // 2)
        return self._hosts[self._turn]

    def _make(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=self._pinned)
