"""Between processes of one machine and user: map the peer's region once, then copy.

The address is process id, its start time (a reused id is another process) and the descriptor of
the memfd. Mappings are kept, one for each region, and let go when their process is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import threading
from collections.abc import Sequence
from typing import Any

from kvxfer.errors import PeerLost, Revoked
from kvxfer.region import _EPOCH, _HEADER, _OPEN, MAGIC, PAGE_BYTES, Region, data_offset
from kvxfer.transports.base import Address, Stamp
from kvxfer.transports.mem import copy_blocks


class ShmTransport:
    """See the module. `host` is this machine's name, as descriptors carry it."""

    name = "shm"

    def __init__(self, host: str) -> None:
        self._host = host
        self._maps: dict[str, _Mapped] = {}
        self._lock = threading.Lock()

    def serve(self, region: Region) -> dict[str, Any]:
        """See `Transport`. The region must be a shared one."""
        pid = os.getpid()
        return {"pid": pid, "start": start_time(pid), "fd": region.fd, "region": region.id}

    def reaches(self, address: Address, host: str) -> bool:
        """See `Transport`."""
        return host == self._host

    def read(
        self,
        address: Address,
        src_blocks: Sequence[int],
        destination: Region,
        dst_blocks: Sequence[int],
        timeout_s: float,
    ) -> Stamp:
        """See `Transport`. A copy in memory has no time-out; the peer takes no part in it."""
        mapped = self._mapped(address)
        if mapped.block_bytes != destination.block_bytes:
            raise PeerLost("the mapped region has blocks of another size")
        if any(not 0 <= block < mapped.num_blocks for block in src_blocks):
            raise PeerLost("a block lies outside of the mapped region")
        copy_blocks(mapped.address, src_blocks, destination, dst_blocks)
        generations, head = mapped.generations, mapped.head
        stamp = Stamp(int(head[_EPOCH]), [generations[block] for block in src_blocks])
        if not head[_OPEN]:
            self._forget(address["region"])
            raise Revoked("the region was revoked")
        if not mapped.alive():
            self._forget(address["region"])
            raise PeerLost(f"process {address['pid']} is gone")
        return stamp

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            self._maps.clear()

    def _mapped(self, address: Address) -> _Mapped:
        with self._lock:
            found = self._maps.get(address["region"])
            if found is None:
                self._drop_dead()
                found = self._maps[address["region"]] = _Mapped(address)
            return found

    def _forget(self, region: str) -> None:
        with self._lock:
            self._maps.pop(region, None)

    def _drop_dead(self) -> None:
        for region, mapped in list(self._maps.items()):
            if not mapped.alive():
                del self._maps[region]


class _Mapped:
    """A peer's region in our address space; unmapped when the last user lets go."""

    def __init__(self, address: Address) -> None:
        self._pidfd = -1
        self.pid, self.start = int(address["pid"]), address["start"]
        self._pidfd = _pidfd(self.pid, self.start)
        try:
            fd = os.open(f"/proc/{self.pid}/fd/{int(address['fd'])}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PeerLost(
                f"the region of process {self.pid}: {error}", errno=error.errno
            ) from error
        try:
            mapped = mmap.mmap(fd, 0)
        except (OSError, ValueError) as error:
            raise PeerLost(f"the region of process {self.pid} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        view = memoryview(mapped)
        magic, _, self.num_blocks, self.block_bytes, _ = _HEADER.unpack_from(view)
        if magic != MAGIC or len(view) < data_offset(self.num_blocks):
            raise PeerLost(f"descriptor {address['fd']} of process {self.pid} is no region")
        self.head = view[: _HEADER.size].cast("Q")
        self.generations = view[PAGE_BYTES : PAGE_BYTES + 8 * self.num_blocks].cast("Q")
        blocks = view[data_offset(self.num_blocks) :]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(blocks))

    def alive(self) -> bool:
        """Whether the process that owns the region still runs."""
        ended = select.poll()  # one for each call: threads cannot share one
        ended.register(self._pidfd, select.POLLIN)
        return not ended.poll(0)

    def __del__(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)


def _pidfd(pid: int, start: str) -> int:
    """Stands for that very process, also when its id is given to another."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        raise PeerLost(f"process {pid} is gone", errno=error.errno) from error
    if start_time(pid) != start:
        os.close(fd)
        raise PeerLost(f"process {pid} is gone")
    return fd


def start_time(pid: int) -> str:
    """When the process began, in the kernel's ticks; "" if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - hot path
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
