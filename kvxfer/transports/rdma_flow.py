"""Pieces over one or several queue pairs, to their end.

Each lane takes the next chain as soon as it has room, so that NICs of different speed share the
work by what they can do; a chain has what a link carries in some milliseconds, several are under
way, and the next is written while the last ones travel. The proof (epoch and generations) travels
behind the data: fenced on one lane, after all of them are empty on several.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvxfer.errors import PeerLost, TransferTimeout
from kvxfer.transports.rdma_device import Spot
from kvxfer.transports.rdma_queue import CHAIN_REQUESTS, CHAINS, STEP_BYTES, Piece, Queue

MOST_PIECE_BYTES = 4 << 20
_LEAST_SHARE_BYTES = 1 << 20
_SPIN_S = 50e-6
_LOOK_S = 0.05
_NAP_S = 0.0005


@dataclass(slots=True)
class Lane:
    """A queue pair, and where the blocks lie for the two NICs that it joins."""

    queue: Queue
    remote: Spot
    local: Spot


class Flow:
    """One read. `tail`: the pieces of the proof and where they lie; it travels on the first lane.

    Raises what the completions say; afterwards the lanes' queue pairs are of no use.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        pieces: Iterable[Piece],
        num_bytes: int,
        tail: tuple[Sequence[Piece], Lane] | None = None,
    ) -> None:
        self._lanes, self._tail = lanes, tail
        self._most_chains = CHAINS if len(lanes) == 1 else 2  # the rest to who is done first
        share_bytes = num_bytes // (len(lanes) * CHAINS) & -STEP_BYTES
        self._share_bytes = max(_LEAST_SHARE_BYTES, share_bytes)
        most_bytes = min(lane.queue.device.most_message_bytes for lane in lanes)
        self._supply = Supply(pieces, min(MOST_PIECE_BYTES, most_bytes))

    def push(self) -> None:
        """Post as much as there is room for."""
        posted = True
        while posted and not self._supply.is_empty:
            posted = any([self._post(lane) for lane in self._lanes])  # noqa: C419 - each has a turn
        if self._supply.is_empty and self._tail is not None:
            pieces, lane = self._tail
            alone = len(self._lanes) == 1
            if lane.queue.room >= len(pieces) and (alone or not self._busy()):
                lane.queue.post(pieces, lane.remote, lane.local, after_all=True)
                self._tail = None

    def _post(self, lane: Lane) -> bool:
        queue = lane.queue
        if self._supply.is_empty or queue.num_chains >= self._most_chains or not queue.room:
            return False
        share_bytes = min(self._share_bytes, queue.chain_bytes)
        chain = self._supply.take(min(CHAIN_REQUESTS, queue.room), share_bytes)
        queue.post(chain, lane.remote, lane.local)
        return True

    def finish(self, deadline: float, is_alive: Callable[[], bool]) -> None:
        """Until everything has arrived. `deadline` is monotonic; `is_alive` is asked now and then.

        Raises TransferTimeout, PeerLost and what completions mean.
        """
        self.push()
        while busy := self._busy():
            wait(busy, deadline, is_alive)
            self.push()

    def _busy(self) -> list[Queue]:
        return [lane.queue for lane in self._lanes if lane.queue.num_chains]


def wait(queues: Sequence[Queue], deadline: float, is_alive: Callable[[], bool]) -> None:
    """Until a chain of one of them has ended: a short while awake, then asleep.

    Raises TransferTimeout, PeerLost when the peer is no longer alive, what completions mean.
    """
    awake = time.monotonic() + _SPIN_S
    while True:
        if any(queue.poll() for queue in queues):
            return
        now = time.monotonic()
        if now >= deadline:
            raise TransferTimeout(
                f"{queues[0].device.nic}: a read did not end in the given time",
                errno=errno.ETIMEDOUT,
            )
        if now < awake:
            continue
        for queue in queues:
            queue.arm()
        if any(queue.poll() for queue in queues):
            return
        if not _sleep(queues, min(deadline - now, _LOOK_S)) and not is_alive():
            raise PeerLost("the peer ended the connection", errno=errno.ECONNRESET)


def _sleep(queues: Sequence[Queue], timeout_s: float) -> bool:
    """Until a completion may have come: then true."""
    known = {queue.fd: queue for queue in queues if queue.fd >= 0}
    if len(known) < len(queues):
        time.sleep(min(timeout_s, _NAP_S))
        return False
    poll = select.poll()
    for fd in known:
        poll.register(fd, select.POLLIN)
    ready = poll.poll(timeout_s * 1000)
    for fd, _ in ready:
        known[fd].disarm()
    return bool(ready)


class Supply:
    """Pieces in order, none longer than `most_bytes`, given out in chains."""

    def __init__(self, pieces: Iterable[Piece], most_bytes: int) -> None:
        self._pieces = iter(pieces)
        self._most_bytes = most_bytes
        self._src = self._dst = self._left = 0
        self._advance()

    @property
    def is_empty(self) -> bool:
        """Whether all were given out."""
        return not self._left

    def take(self, most_requests: int, share_bytes: int) -> list[Piece]:
        """The next ones, until they have the share or are as many as may be. Long pieces are cut
        into shares, so that cuts lie as even as the shares are."""
        chain: list[Piece] = []
        most_bytes = min(self._most_bytes, share_bytes)
        while self._left and share_bytes > 0 and len(chain) < most_requests:
            size = min(self._left, most_bytes)
            chain.append((self._src, self._dst, size))
            share_bytes -= size
            self._src, self._dst, self._left = self._src + size, self._dst + size, self._left - size
            if not self._left:
                self._advance()
        return chain

    def _advance(self) -> None:
        """To the next piece that has bytes."""
        for src, dst, num_bytes in self._pieces:
            if num_bytes:
                self._src, self._dst, self._left = src, dst, num_bytes
                return
