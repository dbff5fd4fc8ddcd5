"""The producer's end: memory registered for reading, queue pairs for those who know the secret.

A reader asks over the control connection, and only there are keys and addresses told:

    connect   its ends of the queue pairs; answered by ours, which live as long as the connection
    region    where a region's blocks and their proof lie, for each of our NICs
    stage     (blocks on a device that no NIC reads) copy pieces into a ring that it may read

Then it reads without us. A region that is revoked is deregistered before `revoke` returns: what is
under way fails at the reader, who asks again and is told.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

from kvxfer.control import ControlServer, Message, Session
from kvxfer.errors import BadDescriptor, KVUsageError, Revoked, TransportError
from kvxfer.region import Region
from kvxfer.transports import rdma_queue
from kvxfer.transports import rdma_verbs as abi
from kvxfer.transports.rdma_device import Device, close_each
from kvxfer.transports.rdma_memory import register_blocks, register_proof, told_spots
from kvxfer.transports.rdma_settings import RdmaSettings
from kvxfer.transports.rdma_staging import MakeCopies, Ring
from kvxfer.transports.rdma_verbs import told

_MOST_ENDS = 64


class RdmaServer:
    """From construction until `close`. `devices` are the transport's. Raises OSError."""

    def __init__(
        self,
        listen: tuple[str, int],
        secret: bytes,
        devices: Sequence[Device],
        settings: RdmaSettings,
        make_copies: MakeCopies,
    ) -> None:
        self._devices, self._settings, self._make_copies = devices, settings, make_copies
        self._offers: dict[str, _Offer] = {}
        self._readers: dict[Session, _Reader] = {}
        self._lock = threading.Lock()
        self._control = ControlServer(listen, secret, self._answer, "kvxfer-rdma")
        self.address = self._control.address

    def add(self, region: Region) -> None:
        """Readers may have it until it is revoked. Raises KVUsageError, TransportError."""
        if not region.open:
            raise KVUsageError("the region was revoked")
        if region.id in self._offers:
            return
        offer = _Offer(region, self._devices)
        with self._lock:
            self._offers[region.id] = offer
        region.on_revoke.append(partial(self._withdraw, region.id))
        if not region.open:  # revoked meanwhile, perhaps before it could tell us
            self._withdraw(region.id)

    def close(self) -> None:
        """Stop listening, end every queue pair, deregister everything. Idempotent."""
        self._control.close()
        with self._lock:
            offers, self._offers = list(self._offers.values()), {}
        close_each(list(offers))

    def _withdraw(self, region_id: str) -> None:
        with self._lock:
            offer = self._offers.pop(region_id, None)
        if offer is not None:
            offer.close()

    def _answer(self, session: Session, request: Message) -> Message:
        asked = request["ask"]
        if asked == "connect":
            return {"ends": self._connect(session, request["ends"])}
        offer = self._offers.get(str(request["region"]))
        if offer is None or not offer.region.open:
            raise Revoked("the peer no longer lets that region be read")
        if asked == "region":
            return offer.told()
        reader = self._readers.get(session)
        if asked != "stage" or reader is None or not offer.staged:
            raise BadDescriptor(f"nobody answers {asked!r} here")
        return reader.stage(offer, request)

    def _connect(self, session: Session, ends: Any) -> list[Message]:
        if not isinstance(ends, list) or not 1 <= len(ends) <= _MOST_ENDS:
            raise BadDescriptor("no ends of queue pairs")
        with self._lock:
            if session in self._readers:
                raise BadDescriptor("connected already")
            reader = self._readers[session] = _Reader(self._devices, self._make_copies)
        session.closers.append(partial(self._leave, session, reader))
        return [reader.connect(index, end, self._settings) for index, end in enumerate(ends)]

    def _leave(self, session: Session, reader: _Reader) -> None:
        with self._lock:
            self._readers.pop(session, None)
        reader.close()


class _Offer:
    """A region that may be read: its registrations on every NIC."""

    def __init__(self, region: Region, devices: Sequence[Device]) -> None:
        self.region = region
        self.rings: WeakSet[Ring] = WeakSet()
        self.lock = threading.Lock()
        self._proof = register_proof(devices, region)
        try:
            self._blocks = register_blocks(devices, region, abi.REMOTE_READ)
        except BaseException:
            self._proof.close()
            raise
        self.staged = self._blocks is None

    def told(self) -> Message:
        """What a reader must know. Raises Revoked."""
        with self.lock:
            proof = told_spots(self._proof.spots)
            blocks = told_spots(self._blocks.spots) if self._blocks is not None else []
        if not proof:
            raise Revoked("the peer no longer lets that region be read")
        return {
            "num_blocks": self.region.num_blocks,
            "block_bytes": self.region.block_bytes,
            "proof": proof,
            "blocks": blocks,
        }

    def close(self) -> None:
        """Deregister. Idempotent."""
        with self.lock:
            close_each([self._proof, *([self._blocks] if self._blocks else [])])
            for ring in self.rings:
                ring.withdraw()


class _Reader:
    """What lives as long as a reader's control connection."""

    def __init__(self, devices: Sequence[Device], make_copies: MakeCopies) -> None:
        self._devices, self._make_copies = devices, make_copies
        self._made: list[Any] = []
        self._rings: dict[str, Ring] = {}

    def connect(self, index: int, theirs: Any, settings: RdmaSettings) -> Message:
        """A queue pair that answers reads. Raises BadDescriptor, TransportError."""
        if not isinstance(theirs, dict):
            raise BadDescriptor("an end that is no object")
        device = self._devices[index % len(self._devices)]
        verbs = device.verbs
        depth = min(device.reads_in, max(rdma_queue.whole(theirs, "depth", 255), 1))
        with told(verbs, f"{device.nic}: no queue pair"):
            queue = verbs.CQ(device.context, 1)
            self._made.append(queue)
            caps = verbs.QPCap(max_send_wr=1, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
            wanted = verbs.QPInitAttr(
                qp_type=abi.QPT_RC, scq=queue, rcq=queue, cap=caps, sq_sig_all=0
            )
            pair = verbs.QP(device.domain, wanted)
            self._made.append(pair)
        psn = rdma_queue.new_psn()
        rdma_queue.connect(device, pair, theirs, psn, (1, depth), settings)
        return rdma_queue.end_of(device, pair, psn, depth)

    def stage(self, offer: _Offer, request: Message) -> Message:
        """Begin to fill one slot, wait for another. The ring is made when it is first asked for.

        Raises Revoked, TransportError, BadDescriptor.
        """
        try:
            ring = self._rings.get(offer.region.id) or self._ring(offer)
            return ring.serve(request)
        except Exception as error:
            if not offer.region.open:
                raise Revoked("the region was revoked meanwhile") from error
            if isinstance(error, MemoryError):
                raise TransportError(f"no ring: {error}", errno=errno.ENOMEM) from error
            raise

    def _ring(self, offer: _Offer) -> Ring:
        region = offer.region
        ring = Ring(region, self._devices, abi.REMOTE_READ, self._make_copies)
        self._rings[region.id] = ring
        self._made.append(ring)
        with offer.lock:
            offer.rings.add(ring)
        return ring

    def close(self) -> None:
        """Last made, first closed."""
        close_each(self._made)
