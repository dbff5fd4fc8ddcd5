"""A queue pair that reads from one of a peer: many requests in one chain, the last one signalled.

    post: a chain of requests, one call to the device
    poll: the oldest chain is done, or the queue pair is broken and stays so
    arm: the next completion makes `fd` readable, for waits that are long

Requests that are not signalled say so all the same when they fail: the completion queue has room
for all. Not safe to share among threads.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvxfer.errors import BadDescriptor
from kvxfer.transports import rdma_verbs as abi
from kvxfer.transports.rdma_device import Device, Spot, close_each
from kvxfer.transports.rdma_settings import RdmaSettings
from kvxfer.transports.rdma_status import status_error
from kvxfer.transports.rdma_verbs import as_ours, told

Piece = tuple[int, int, int]
"""Source byte, destination byte, length"""
CHAIN_REQUESTS = 128
CHAINS = 4
LEAST_BYTES, FIRST_BYTES, MOST_BYTES = 256 << 10, 1 << 20, 64 << 20
"""Of one chain, in steps of"""
STEP_BYTES = 64 << 10
_CHAIN_S = 0.01
_GID = re.compile(r"[0-9a-f]{4}(:[0-9a-f]{4}){7}")
_making_channel = threading.Lock()


class _Chain(NamedTuple):
    num_requests: int
    num_bytes: int
    posted_at: float


class Queue:
    """The reader's end of a connection between two NICs. Raises TransportError."""

    def __init__(self, device: Device) -> None:
        self.device = device
        most = (CHAINS + 1) * CHAIN_REQUESTS  # one more for the proof
        self.room = min(most, device.most_requests, device.most_completions - 1)
        """Requests that may be posted now."""
        self._psn = new_psn()
        self._chains: deque[_Chain] = deque()  # those under way, oldest first
        self._ended_at = 0.0
        self.chain_bytes = FIRST_BYTES
        """What the link carries in some milliseconds, by the chains so far: more at once would wait
        for itself, and on a slow link for longer than the peer is waited for."""
        self._made: list[Any] = []
        try:
            with told(device.verbs, f"{device.nic}: no queue pair"):
                self._make(device, self.room)
        except BaseException:
            self.close()
            raise

    def _make(self, device: Device, room: int) -> None:
        verbs = device.verbs
        self._channel, self.fd = _channel(device)
        self._made.append(self._channel)
        self._cq = verbs.CQ(device.context, room + 1, channel=self._channel)
        self._made.append(self._cq)
        caps = verbs.QPCap(max_send_wr=room, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        self._sge = verbs.SGE(0, 0, 0)
        try:
            wanted = verbs.QPInitAttrEx(
                qp_type=abi.QPT_RC,
                scq=self._cq,
                rcq=self._cq,
                cap=caps,
                sq_sig_all=0,
                pd=device.domain,
                comp_mask=abi.WITH_PD | abi.WITH_SEND_OPS,
                send_ops_flags=abi.SEND_OPS_READ,
            )
            self._qp, self.extended = verbs.QPEx(device.context, wanted), True
        except verbs.Error:  # a provider without the extended interface
            plain = verbs.QPInitAttr(
                qp_type=abi.QPT_RC, scq=self._cq, rcq=self._cq, cap=caps, sq_sig_all=0
            )
            self._qp, self.extended = verbs.QP(device.domain, plain), False
        self._made.append(self._qp)

    @property
    def end(self) -> dict[str, Any]:
        """What the peer must know of this end."""
        return end_of(self.device, self._qp, self._psn, self.device.reads_out)

    def connect(self, theirs: Mapping[str, Any], settings: RdmaSettings) -> None:
        """Ready to read. Raises TransportError, BadDescriptor."""
        depth = min(self.device.reads_out, whole(theirs, "depth", 255))
        connect(self.device, self._qp, theirs, self._psn, (max(depth, 1), 1), settings)

    @property
    def num_chains(self) -> int:
        """Chains that are under way."""
        return len(self._chains)

    def post(
        self, pieces: Sequence[Piece], remote: Spot, local: Spot, *, after_all: bool = False
    ) -> None:
        """One chain. With `after_all` it begins when every earlier read has ended."""
        with told(self.device.verbs, f"{self.device.nic}: the reads are refused"):
            if self.extended:
                self._post_extended(pieces, remote, local, abi.FENCE if after_all else 0)
            else:
                self._post_plain(pieces, remote, local, abi.FENCE if after_all else 0)
        self.room -= len(pieces)
        num_bytes = sum(num_bytes for _, _, num_bytes in pieces)
        self._chains.append(_Chain(len(pieces), num_bytes, time.monotonic()))

    def _post_extended(
        self, pieces: Sequence[Piece], remote: Spot, local: Spot, flags: int
    ) -> None:
        qp, sge, key, there, here = self._qp, self._sge, remote.key, remote.address, local.address
        sge.lkey = local.key
        last = len(pieces) - 1
        qp.wr_start()
        try:
            qp.wr_id = 0
            qp.wr_flags = flags
            for index, (src, dst, num_bytes) in enumerate(pieces):
                if index == last:
                    qp.wr_flags = (flags if last == 0 else 0) | abi.SIGNALED
                elif index == 1:
                    qp.wr_flags = 0
                qp.wr_rdma_read(key, there + src)
                sge.addr = here + dst
                sge.length = num_bytes
                qp.wr_set_sge(sge)
        except BaseException:
            qp.wr_abort()
            raise
        qp.wr_complete()

    def _post_plain(self, pieces: Sequence[Piece], remote: Spot, local: Spot, flags: int) -> None:
        verbs, following, kept = self.device.verbs, None, []
        signal = abi.SIGNALED
        for index in range(len(pieces) - 1, -1, -1):
            src, dst, num_bytes = pieces[index]
            request = verbs.SendWR(
                opcode=abi.OPCODE_READ,
                num_sge=1,
                sg=[verbs.SGE(local.address + dst, num_bytes, local.key)],
                send_flags=signal | (flags if index == 0 else 0),
                next_wr=following,
            )
            request.set_wr_rdma(remote.key, remote.address + src)
            following, signal = request, 0
            kept.append(request)  # the chain points to them
        self._qp.post_send(following, None)

    def poll(self) -> bool:
        """Whether a chain ended. Raises what the status means; the queue pair is of no use then."""
        try:
            _, found = self._cq.poll(CHAINS)
        except self.device.verbs.Error as error:
            raise as_ours(error, f"{self.device.nic}: no completions") from error
        for completion in found:
            if completion.status:
                raise status_error(completion.status, self.device.nic)
            self._end(self._chains.popleft())
        return bool(found)

    def _end(self, chain: _Chain) -> None:
        now = time.monotonic()
        took_s = now - max(chain.posted_at, self._ended_at)
        self.room += chain.num_requests
        self._ended_at = now
        if chain.num_bytes >= LEAST_BYTES:
            carries = chain.num_bytes * _CHAIN_S / max(took_s, 1e-6)
            most = min(2 * self.chain_bytes, MOST_BYTES)
            self.chain_bytes = min(max(int(carries) & -STEP_BYTES, LEAST_BYTES), most)

    def arm(self) -> None:
        """The next completion makes `fd` readable; poll once more before waiting for it."""
        if self.fd >= 0:
            with told(self.device.verbs, f"{self.device.nic}: no notice of completions"):
                self._cq.req_notify()

    def disarm(self) -> None:
        """Take the notice that made `fd` readable."""
        with told(self.device.verbs, f"{self.device.nic}: no notice of completions"):
            self._channel.get_cq_event(self._cq)
        self._cq.ack_events(1)

    def close(self) -> None:
        """Nothing is written to our memory afterwards. Idempotent."""
        close_each(self._made)


def new_psn() -> int:
    """Where a queue pair begins to count its packets: not to be guessed."""
    return secrets.randbits(24)


def end_of(device: Device, qp: Any, psn: int, depth: int) -> dict[str, Any]:
    """What the other end must know of a queue pair."""
    return {
        "qpn": int(qp.qp_num),
        "psn": psn,
        "gid": device.gid,
        "lid": device.lid,
        "mtu": device.mtu,
        "depth": depth,
    }


def connect(
    device: Device,
    qp: Any,
    theirs: Mapping[str, Any],
    psn: int,
    depths: tuple[int, int],
    settings: RdmaSettings,
) -> None:
    """Ready to send and receive. `depths`: reads under way that we ask for, that we answer.

    Raises TransportError, BadDescriptor for an end that makes no sense.
    """
    verbs, out, into = device.verbs, *depths
    gid = theirs.get("gid")
    if not isinstance(gid, str) or not _GID.fullmatch(gid):
        raise BadDescriptor("a queue pair without a GID")
    attr = verbs.QPAttr(port_num=device.port)
    attr.dest_qp_num = whole(theirs, "qpn", 0xFFFFFF)
    attr.rq_psn = whole(theirs, "psn", 0xFFFFFF)
    attr.path_mtu = min(device.mtu, max(whole(theirs, "mtu", 5), 1))
    attr.sq_psn = psn
    attr.qp_access_flags = abi.REMOTE_READ
    attr.max_rd_atomic, attr.max_dest_rd_atomic = out, into
    attr.min_rnr_timer = 12
    attr.timeout, attr.retry_cnt, attr.rnr_retry = settings.ib_timeout, settings.retry_count, 6
    with told(verbs, f"{device.nic}: no way to the peer's NIC"):
        route = verbs.GlobalRoute(dgid=verbs.GID(gid), sgid_index=device.gid_index, hop_limit=64)
        attr.ah_attr = verbs.AHAttr(
            dlid=whole(theirs, "lid", 0xFFFF), gr=route, is_global=1, port_num=device.port
        )
        qp.to_rts(attr)


def whole(message: Mapping[str, Any], name: str, most: int) -> int:
    """A number of a peer's message. Raises BadDescriptor."""
    value = message.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise BadDescriptor(f"a queue pair whose {name} is {value!r}")
    return value


def _channel(device: Device) -> tuple[Any, int]:
    """A completion channel and its descriptor; -1 where that cannot be told.

    Before rdma-core 5x pyverbs does not say which descriptor it is: it is the one that is new.
    """
    with _making_channel:
        before = set(_channels())
        channel = device.verbs.CompChannel(device.context)
        if hasattr(channel, "fd"):
            return channel, int(channel.fd)
        new = [fd for fd in _channels() if fd not in before]
    return channel, new[0] if len(new) == 1 else -1


def _channels() -> list[int]:
    """This process's descriptors of that kind."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):  # noqa: PTH115
                found.append(int(name))
        except OSError:
            continue
    return found
