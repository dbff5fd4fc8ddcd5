"""The reader's connection to one producer: a control connection and a queue pair for each pair of
NICs: the first of ours with the first of theirs and so on, the shorter list over again. One read at
a time; whoever fails on it throws it away, and the next read makes another.

    connect       tell our ends, get theirs
    once a region where its blocks and their proof lie, and the keys
    each read     the data over all lanes; behind it header and generations, into our mirror of them
    close         no queue pair is left at either end, no byte is written to our memory afterwards
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvxfer.control import ControlClient, Message
from kvxfer.errors import (
    AccessDenied,
    BadDescriptor,
    KVTransferError,
    PeerLost,
    Revoked,
    TransportError,
)
from kvxfer.plan import ReadPlan
from kvxfer.region import EPOCH, HEADER, MAGIC, OPEN, PAGE_BYTES, Region, data_offset
from kvxfer.transports import rdma_verbs as abi
from kvxfer.transports import wire
from kvxfer.transports.base import Stamp, check_source
from kvxfer.transports.rdma_device import Device, Spot, close_each
from kvxfer.transports.rdma_flow import Flow, Lane
from kvxfer.transports.rdma_memory import heard_spots, register_host
from kvxfer.transports.rdma_queue import CHAIN_REQUESTS, Piece, Queue, whole
from kvxfer.transports.rdma_settings import RdmaSettings
from kvxfer.transports.rdma_staging import MakeCopies, RemoteRing, Ring, move
from kvxfer.transports.rdma_target import Target

_GAP_BYTES = 4096
_LAST_WORD_S = 1.0
_MOST_BLOCKS = 1 << 32


class Source(NamedTuple):
    """A region of the producer, as it told. For each of its NICs."""

    num_blocks: int
    block_bytes: int
    proof: list[Spot]
    blocks: list[Spot]
    """None of them: the blocks are staged."""

    def __repr__(self) -> str:
        return f"Source({self.num_blocks} blocks of {self.block_bytes} bytes)"


class Link:
    """Connects at once. Raises AccessDenied, PeerLost, TransferTimeout, TransportError."""

    def __init__(
        self,
        where: tuple[str, int],
        num_peer_nics: int,
        secret: bytes,
        devices: Sequence[Device],
        settings: RdmaSettings,
        make_copies: MakeCopies,
        deadline: float,
    ) -> None:
        self._devices, self._make_copies = devices, make_copies
        self._sources: dict[str, Source] = {}
        self._mirror: _Mirror | None = None
        self._rings: dict[str, Ring] = {}
        self._made: list[Any] = []
        try:
            self._control = ControlClient(where, secret, wire.left(deadline))
            self._made.append(self._control)
            self._queues: list[Queue] = []
            for index in range(max(len(devices), num_peer_nics)):
                self._queues.append(Queue(devices[index % len(devices)]))
                self._made.append(self._queues[-1])
            self._connect(settings, deadline)
        except BaseException:
            self.close()
            raise

    def _connect(self, settings: RdmaSettings, deadline: float) -> None:
        asked = {"ask": "connect", "ends": [queue.end for queue in self._queues]}
        ends = self._control.ask(asked, wire.left(deadline)).get("ends")
        if not isinstance(ends, list) or len(ends) != len(self._queues):
            raise BadDescriptor("the peer has other ends")
        for queue, end in zip(self._queues, ends, strict=True):
            if not isinstance(end, dict):
                raise BadDescriptor("an end that is no object")
            queue.connect(end, settings)

    @property
    def is_open(self) -> bool:
        """Whether the producer is still there, as far as can be told without asking it."""
        return self._control.is_open

    def read(self, region: str, plan: ReadPlan, target: Target, deadline: float) -> Stamp:
        """See `Transport.read`. After an error the link is of no use."""
        source = self._source(region, deadline)
        check_source(plan, source.num_blocks, source.block_bytes)
        mirror = self._mirror_of(source)
        proof = proof_pieces(plan.src_blocks, min(CHAIN_REQUESTS, self._queues[0].room))
        lane = Lane(self._queues[0], source.proof[0], mirror.spot)
        try:
            if source.blocks and target.spots:
                lanes = self._lanes(source.blocks, target.spots)
                flow = Flow(lanes, plan.pieces(), plan.num_bytes, (proof, lane))
            else:
                self._read_staged(region, source, plan, target, deadline)
                flow = Flow([lane], (), 0, (proof, lane))
            flow.finish(deadline, self._control_is_open)
        except AccessDenied as error:
            raise self._why(region, deadline, error) from error
        return mirror.stamp(plan.src_blocks)

    def _lanes(self, remote: Sequence[Spot], local: Sequence[Spot]) -> list[Lane]:
        return [
            Lane(queue, remote[index % len(remote)], local[index % len(local)])
            for index, queue in enumerate(self._queues)
        ]

    def _read_staged(
        self, region: str, source: Source, plan: ReadPlan, target: Target, deadline: float
    ) -> None:
        """Through the ring of either end that has its blocks on a device that NICs do not reach."""

        def ask(request: Message) -> Message:
            return self._control.ask(request, wire.left(deadline))

        remote = None if source.blocks else RemoteRing(region, ask)
        local = None if target.spots else self._ring(target.region)
        lanes = self._lanes(
            remote.spots if remote else source.blocks, local.spots if local else target.spots
        )

        def carry(pieces: Sequence[Piece]) -> Flow:
            flow = Flow(lanes, pieces, sum(size for _, _, size in pieces))
            flow.push()
            return flow

        move(
            *(plan.pieces(), remote, local, carry),
            lambda flow: flow.finish(deadline, self._control_is_open),
        )

    def _ring(self, region: Region) -> Ring:
        ring = self._rings.get(region.id)
        if ring is None:
            ring = Ring(region, self._devices, abi.LOCAL_WRITE, self._make_copies)
            self._rings[region.id] = ring
            self._made.append(ring)
        return ring

    def _source(self, region: str, deadline: float) -> Source:
        found = self._sources.get(region)
        if found is None:
            found = self._sources[region] = self._ask_source(region, deadline)
        return found

    def _ask_source(self, region: str, deadline: float) -> Source:
        told = self._control.ask({"ask": "region", "region": region}, wire.left(deadline))
        source = Source(
            whole(told, "num_blocks", _MOST_BLOCKS),
            whole(told, "block_bytes", 1 << 48),
            heard_spots(told.get("proof")),
            heard_spots(told.get("blocks")),
        )
        if not source.proof:
            raise BadDescriptor("the peer tells no proof")
        return source

    def _why(self, region: str, deadline: float, error: AccessDenied) -> KVTransferError:
        """The producer says whether it is for a revocation that its device refused us."""
        try:
            self._ask_source(region, max(deadline, time.monotonic() + _LAST_WORD_S))
        except (TransportError, TimeoutError) as told:
            return told if isinstance(told, TransportError) else error
        return error

    def _mirror_of(self, source: Source) -> _Mirror:
        """One that is large enough."""
        wanted = data_offset(source.num_blocks)
        if self._mirror is None or self._mirror.num_bytes < wanted:
            self._mirror = _Mirror(self._devices[0], wanted)
            self._made.append(self._mirror)
        return self._mirror

    def _control_is_open(self) -> bool:
        return self._control.is_open

    def close(self) -> None:
        """See the module. Idempotent."""
        close_each(self._made)


class _Mirror:
    """Where a copy of a region's header and generations lands, at the same offsets."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(-1, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._memory = register_host([device], address, num_bytes, abi.LOCAL_WRITE)
        self.spot = self._memory.spots[0]

    def stamp(self, blocks: Sequence[int]) -> Stamp:
        """What was read. Raises Revoked, PeerLost for what is no region."""
        header = HEADER.unpack_from(self._map)
        if header[0] != MAGIC:
            raise PeerLost("the peer's region is none", errno=errno.EPROTO)
        if not header[OPEN]:
            raise Revoked("the region was revoked")
        generations = memoryview(self._map)[PAGE_BYTES:].cast("Q")
        return Stamp(header[EPOCH], [generations[block] for block in blocks])

    def close(self) -> None:
        """Deregister it; the memory goes with its last reference."""
        self._memory.close()


def proof_pieces(blocks: Sequence[int], most: int) -> list[Piece]:
    """Header and generations of the blocks, at the same offsets at both ends, in at most `most`
    pieces. What lies close together is one piece: a request costs as much as some KiB."""
    wanted = [(0, HEADER.size)]
    wanted += [(PAGE_BYTES + 8 * block, PAGE_BYTES + 8 * block + 8) for block in sorted(blocks)]
    runs = [list(wanted[0])]
    for start, end in wanted[1:]:
        if start - runs[-1][1] <= _GAP_BYTES:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    if len(runs) > most:
        runs = [[0, runs[-1][1]]]
    return [(start, start, end - start) for start, end in runs]
