"""Blocks on a device that no NIC reaches: through rings of page-locked host memory.

The reader cuts its pieces into chunks that fit a slot of either end's ring, and for chunk i at once
the producer's device fills the slot of i + 1, the NICs carry i, and the reader's device empties the
slot of i - 1. Either end may need a ring; the other one reads from, or writes to, its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvxfer.control import Message
from kvxfer.errors import BadDescriptor
from kvxfer.region import Region
from kvxfer.transports.bounce import Copies, CudaCopies
from kvxfer.transports.rdma_device import Device, Spot
from kvxfer.transports.rdma_flow import Flow
from kvxfer.transports.rdma_memory import heard_spots, register_host, told_spots
from kvxfer.transports.rdma_queue import Piece

MakeCopies = Callable[[Region, int, int], Copies]
"""(region, slots, bytes of the ring)"""
cuda_copies: MakeCopies = CudaCopies
NUM_SLOTS, SLOT_BYTES = 3, 4 << 20


class Ring:
    """Slots beside a region, registered with every device. Raises TransportError, MemoryError."""

    def __init__(
        self, region: Region, devices: Sequence[Device], access: int, make_copies: MakeCopies
    ) -> None:
        self._region = region
        num_bytes = NUM_SLOTS * SLOT_BYTES
        self._copies = make_copies(region, NUM_SLOTS, num_bytes)
        try:
            self._memory = register_host(devices, self._copies.address, num_bytes, access)
        except BaseException:
            self._copies.close()
            raise

    @property
    def spots(self) -> list[Spot]:
        """Where the ring lies for each device."""
        return self._memory.spots

    def serve(self, request: Message) -> Message:
        """The producer's end: begin to `fill` a slot, wait for the one that is wanted `ready`."""
        fill, ready = request["fill"], request["ready"]
        if fill is not None:
            chunk = [(_byte(start), _byte(size)) for start, size in fill["pieces"]]
            if sum(size for _, size in chunk) > SLOT_BYTES or any(
                start + size > self._region.num_bytes for start, size in chunk
            ):
                raise BadDescriptor("no such pieces in that region")
            slot = _slot(fill["slot"])
            self._copies.to_host(slot, slot * SLOT_BYTES, chunk)
        if ready is not None:
            self._copies.wait(_slot(ready))
        return {
            "ring": told_spots(self.spots),
            "slots": NUM_SLOTS,
            "slot_bytes": SLOT_BYTES,
        }

    def empty(self, slot: int, chunk: Sequence[tuple[int, int]]) -> None:
        """The reader's end: begin to copy a slot into pieces of the region."""
        self._copies.to_device(slot, slot * SLOT_BYTES, list(chunk))

    def wait(self, slot: int) -> None:
        """Until what was begun for the slot is done."""
        self._copies.wait(slot)

    def withdraw(self) -> None:
        """Nobody reads it any more."""
        self._memory.close()

    def close(self) -> None:
        """Deregister it, give the memory back when no copy is under way."""
        try:
            self._memory.close()
            for slot in range(NUM_SLOTS):
                self._copies.wait(slot)
        finally:
            self._copies.close()


class RemoteRing:
    """The producer's ring, as the reader uses it. `ask` goes over the control connection."""

    def __init__(self, region: str, ask: Callable[[Message], Message]) -> None:
        self._region, self._ask = region, ask
        told = self._stage(None, None)
        self.spots = heard_spots(told.get("ring"))
        slots, size = told.get("slots"), told.get("slot_bytes")
        if slots != NUM_SLOTS or size != SLOT_BYTES or not self.spots:
            raise BadDescriptor("the peer has another kind of ring")

    def turn(self, index: int, chunks: Sequence[Sequence[Piece]]) -> None:
        """Chunk `index` lies in its slot when it returns; the next one is on its way."""
        if index == 0:
            self._stage(0, chunks[0])
        following = index + 1
        more = chunks[following] if following < len(chunks) else None
        self._stage(following % NUM_SLOTS, more, ready=index % NUM_SLOTS)

    def _stage(
        self, slot: int | None, chunk: Sequence[Piece] | None, ready: int | None = None
    ) -> Message:
        fill = {"slot": slot, "pieces": [[src, size] for src, _, size in chunk]} if chunk else None
        return self._ask({"ask": "stage", "region": self._region, "fill": fill, "ready": ready})


def move(
    pieces: Sequence[Piece],
    remote: RemoteRing | None,
    local: Ring | None,
    carry: Callable[[Sequence[Piece]], Flow],
    end: Callable[[Flow], None],
) -> None:
    """See the module. `carry` begins a read of pieces between what lies there and here (a ring or
    the blocks), `end` waits for it. Raises what they raise."""
    chunks = slots_of(pieces, SLOT_BYTES)
    flow: Flow | None = None
    for index, chunk in enumerate(chunks):
        if remote is not None:
            remote.turn(index, chunks)
        if flow is not None:
            _land(flow, index - 1, chunks, local, end)
        slot = index % NUM_SLOTS
        if local is not None:
            local.wait(slot)
        at = slot * SLOT_BYTES
        flow = carry(carried(chunk, at if remote else None, at if local else None))
    if flow is not None:
        _land(flow, len(chunks) - 1, chunks, local, end)
    if local is not None:
        for slot in range(NUM_SLOTS):
            local.wait(slot)


def _land(
    flow: Flow,
    index: int,
    chunks: Sequence[Sequence[Piece]],
    local: Ring | None,
    end: Callable[[Flow], None],
) -> None:
    """The chunk has arrived; on to the device with it."""
    end(flow)
    if local is not None:
        local.empty(index % NUM_SLOTS, [(dst, size) for _, dst, size in chunks[index]])


def slots_of(pieces: Sequence[Piece], slot_bytes: int) -> list[list[Piece]]:
    """The pieces, cut so that those of one list fit a slot."""
    found: list[list[Piece]] = []
    room = 0
    for src, dst, num_bytes in pieces:
        while num_bytes:
            if not room:
                found.append([])
                room = slot_bytes
            part = min(num_bytes, room)
            found[-1].append((src, dst, part))
            src, dst, num_bytes, room = src + part, dst + part, num_bytes - part, room - part
    return found


def carried(chunk: Sequence[Piece], from_slot: int | None, to_slot: int | None) -> list[Piece]:
    """What the NICs copy for a chunk: from the blocks or from byte `from_slot` of the ring there,
    into the blocks or to byte `to_slot` of the ring here, where its pieces lie in a row."""
    if from_slot is not None and to_slot is not None:
        return [(from_slot, to_slot, sum(size for _, _, size in chunk))]
    found, at = [], 0
    for src, dst, size in chunk:
        found.append(
            (
                src if from_slot is None else from_slot + at,
                dst if to_slot is None else to_slot + at,
                size,
            )
        )
        at += size
    return found


def _byte(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadDescriptor("a piece that is none")
    return value


def _slot(value: Any) -> int:
    if type(value) is not int or not 0 <= value < NUM_SLOTS:
        raise BadDescriptor("a slot that is none")
    return value
