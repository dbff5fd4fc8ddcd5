"""pyverbs without a device: queue pairs of one process that copy memory, and fail on order.

`Fabric` is the machine: its devices, what is registered, what is open. A read happens when it is
posted; the completion waits in its queue. `fail` and `hang` say what becomes of the next chain.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

from kvxfer.transports.rdma_verbs import FENCE, LOCAL_WRITE, REMOTE_READ, SIGNALED, Verbs


class FakeError(Exception):
    def __init__(self, text: str, error_code: int = -1) -> None:
        super().__init__(text)
        self.error_code = error_code


class Fabric:
    """See the module."""

    def __init__(
        self, *names: str, extended: bool = True, dmabuf: bool = False, most_message: int = 1 << 31
    ) -> None:
        self.names = names or ("fake0",)
        self.extended, self.dmabuf, self.most_message = extended, dmabuf, most_message
        self.down: set[str] = set()
        self.open: list[Any] = []
        """Everything made and not closed."""
        self.keys: dict[int, MR] = {}
        self.pairs: dict[int, QP] = {}
        self.numbers = itertools.count(100)
        self.fail: deque[int] = deque()
        """Statuses for the next chains; 0 is a good one."""
        self.hang = False
        """Nothing completes any more."""
        self.posted: list[tuple[str, list[tuple[int, int]]]] = []
        """(device, [(bytes, flags) of each request]) of every chain."""
        self.lock = threading.RLock()

    def count(self, kind: str) -> int:
        return sum(type(made).__name__ == kind for made in self.open)

    def verbs(self) -> Verbs:
        fabric = self

        def bound(kind: type) -> Any:
            return lambda *args, **named: kind(fabric, *args, **named)

        def plain(*args: Any, **named: Any) -> SimpleNamespace:
            return SimpleNamespace(**named)

        def extended_qp(*args: Any, **named: Any) -> QP:
            if not fabric.extended:
                raise FakeError("no extended queue pairs", 95)
            return QP(fabric, args[1].pd, args[1])

        def devices() -> list[SimpleNamespace]:
            if not fabric.names or fabric.names == ("",):
                raise FakeError("Failed to get devices list")
            return [SimpleNamespace(name=name.encode()) for name in fabric.names]

        return Verbs(
            get_device_list=devices,
            Context=bound(Context),
            PD=bound(PD),
            CQ=bound(CQ),
            CompChannel=bound(CompChannel),
            QP=bound(QP),
            QPEx=extended_qp,
            QPCap=plain,
            QPInitAttr=plain,
            QPInitAttrEx=plain,
            QPAttr=plain,
            AHAttr=plain,
            GlobalRoute=plain,
            GID=lambda text: text,
            MR=bound(MR),
            DmaBufMR=bound(DmaBufMR),
            SendWR=SendWR,
            SGE=SGE,
            Error=FakeError,
        )


class _Made:
    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        fabric.open.append(self)

    def close(self) -> None:
        with self.fabric.lock:
            if self in self.fabric.open:
                self.fabric.open.remove(self)


class Context(_Made):
    def __init__(self, fabric: Fabric, *, name: str) -> None:
        if name not in fabric.names:
            raise FakeError(f"no {name}", 19)
        super().__init__(fabric)
        self.name = name

    def query_port(self, port: int) -> SimpleNamespace:
        if port != 1:
            raise FakeError("no such port", 22)
        state = 1 if self.name in self.fabric.down else 4
        return SimpleNamespace(
            state=state, lid=0, active_mtu=5, max_msg_sz=self.fabric.most_message, link_layer=2
        )

    def query_device(self) -> SimpleNamespace:
        return SimpleNamespace(
            max_qp_wr=16384, max_cqe=32767, max_qp_init_rd_atom=128, max_qp_rd_atom=16
        )

    def query_gid(self, port: int, index: int) -> str:
        return "0000:0000:0000:0000:0000:ffff:c000:0201"


class PD(_Made):
    def __init__(self, fabric: Fabric, context: Context) -> None:
        super().__init__(fabric)
        self.context = context


class MR(_Made):
    def __init__(
        self, fabric: Fabric, domain: PD, num_bytes: int, access: int, *, address: int
    ) -> None:
        super().__init__(fabric)
        self.domain, self.num_bytes, self.access, self.address = domain, num_bytes, access, address
        self.host = address  # where the bytes are for memmove
        self.lkey = self.rkey = next(fabric.numbers)
        fabric.keys[self.rkey] = self

    def has(self, address: int, size: int, access: int) -> bool:
        inside = self.address <= address and address + size <= self.address + self.num_bytes
        return inside and bool(self.access & access)

    def close(self) -> None:
        with self.fabric.lock:
            self.fabric.keys.pop(self.rkey, None)
        super().close()


class DmaBufMR(MR):
    """Over a memfd instead of a GPU: `fd` is mapped, addresses count from its start."""

    def __init__(
        self, fabric: Fabric, domain: PD, num_bytes: int, access: int, *, dmabuf: int, offset: int
    ) -> None:
        import mmap

        if not fabric.dmabuf:
            raise FakeError("Failed to register a dma-buf MR", 95)
        super().__init__(fabric, domain, num_bytes, access, address=offset)
        self._map = mmap.mmap(dmabuf, os.fstat(dmabuf).st_size)
        self.host = offset + ctypes.addressof(ctypes.c_char.from_buffer(self._map))


class CompChannel(_Made):
    def __init__(self, fabric: Fabric, context: Context) -> None:
        super().__init__(fabric)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def get_cq_event(self, cq: CQ) -> None:
        os.eventfd_read(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        super().close()


class CQ(_Made):
    def __init__(
        self, fabric: Fabric, context: Context, size: int, *, channel: CompChannel | None = None
    ) -> None:
        super().__init__(fabric)
        self.size, self.channel, self.armed = size, channel, False
        self.found: deque[SimpleNamespace] = deque()

    def poll(self, most: int) -> tuple[int, list[SimpleNamespace]]:
        with self.fabric.lock:
            taken = [self.found.popleft() for _ in range(min(most, len(self.found)))]
        return len(taken), taken

    def put(self, status: int) -> None:
        self.found.append(SimpleNamespace(status=status, wr_id=0))
        assert len(self.found) <= self.size, "the completion queue overflows"
        if self.armed and self.channel is not None:
            self.armed = False
            os.eventfd_write(self.channel.fd, 1)

    def req_notify(self) -> None:
        self.armed = True

    def ack_events(self, count: int) -> None:
        pass


class SGE:
    def __init__(self, addr: int, length: int, lkey: int) -> None:
        self.addr, self.length, self.lkey = addr, length, lkey


class SendWR:
    def __init__(
        self, *, opcode: int, num_sge: int, sg: list[SGE], send_flags: int, next_wr: SendWR | None
    ) -> None:
        assert opcode == 4 and num_sge == len(sg) == 1
        self.sge, self.flags, self.next_wr = sg[0], send_flags, next_wr

    def set_wr_rdma(self, rkey: int, address: int) -> None:
        self.rkey, self.address = rkey, address


class QP(_Made):
    """Plain and extended in one."""

    def __init__(self, fabric: Fabric, domain: PD, init: SimpleNamespace) -> None:
        super().__init__(fabric)
        self.domain, self.init = domain, init
        self.qp_num = next(fabric.numbers)
        self.attr: SimpleNamespace | None = None
        self.broken = False
        self.wr_id = self.wr_flags = 0
        self._chain: list[Any] = []
        fabric.pairs[self.qp_num] = self

    def to_rts(self, attr: SimpleNamespace) -> None:
        assert self.domain in self.fabric.open, "the domain was closed"
        self.attr = attr

    def wr_start(self) -> None:
        self._chain = []

    def wr_rdma_read(self, rkey: int, address: int) -> None:
        self._chain.append([rkey, address, self.wr_flags])

    def wr_set_sge(self, sge: SGE) -> None:
        self._chain[-1] += [sge.addr, sge.length, sge.lkey]

    def wr_abort(self) -> None:
        self._chain = []

    def wr_complete(self) -> None:
        self._run(self._chain)

    def post_send(self, first: SendWR, bad: object) -> None:
        chain, found = [], first
        while found is not None:
            sge = found.sge
            chain.append([found.rkey, found.address, found.flags, sge.addr, sge.length, sge.lkey])
            found = found.next_wr  # type: ignore[assignment]
        self._run(chain)

    def _run(self, chain: list[Any]) -> None:
        fabric = self.fabric
        assert self.attr is not None and self in fabric.open
        with fabric.lock:
            name = self.domain.context.name
            fabric.posted.append((name, [(size, flags) for _, _, flags, _, size, _ in chain]))
            if fabric.hang:
                return
            order = fabric.fail.popleft() if fabric.fail else 0
            for request in chain:
                status = 5 if self.broken else order or self._read(*request)
                self.broken = self.broken or bool(status)
                if status or request[2] & SIGNALED:
                    self.init.scq.put(status)

    def _read(self, rkey: int, remote: int, flags: int, local: int, size: int, lkey: int) -> int:
        assert flags & ~(FENCE | SIGNALED) == 0
        fabric, attr = self.fabric, self.attr
        assert attr is not None
        peer = fabric.pairs.get(attr.dest_qp_num)
        if peer is None or peer.attr is None or peer.attr.dest_qp_num != self.qp_num:
            return 12
        there, here = fabric.keys.get(rkey), fabric.keys.get(lkey)
        if there is None or there.domain is not peer.domain:
            return 10
        if not there.has(remote, size, REMOTE_READ):
            return 10
        if here is None or here.domain is not self.domain or not here.has(local, size, LOCAL_WRITE):
            return 4
        source, target = there.host + remote - there.address, here.host + local - here.address
        ctypes.memmove(target, source, size)
        return 0

    def close(self) -> None:
        with self.fabric.lock:
            self.fabric.pairs.pop(self.qp_num, None)
        super().close()
