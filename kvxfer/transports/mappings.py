"""Peers' regions in our address space: mapped once, read only, let go when their process ends.

A peer is known by process id and start time, and followed by a pidfd, which an id given to
another process later does not confuse. One thread waits on the pidfds while there are mappings, so
that the memory of a killed peer goes back without anybody asking for it. It knows the processes
alone: a mapping goes at once when it is forgotten and the reads that use it are done. Where it is
told to, it also looks every second for regions that were revoked.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import weakref

from kvxfer import pages
from kvxfer.errors import BadDescriptor, PeerLost
from kvxfer.region import EPOCH, HEADER, MAGIC, OPEN, PAGE_BYTES, data_offset
from kvxfer.transports.base import Address, number, text

_POLL_MS = 1000  # where the kernel has no pidfd, or revoked regions are looked for


class Mappings:
    """By region's id. Safe to share among threads.

    `looks`: what was revoked goes within a second, though nobody reads it.
    """

    def __init__(self, *, looks: bool = False) -> None:
        self._looks = looks
        self._maps: dict[str, Mapped] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake_fd = -1

    def get(self, address: Address) -> Mapped:
        """Raises PeerLost where the process or its region is gone, BadDescriptor for nonsense."""
        region = address.get("region")
        found = self._maps.get(region) if isinstance(region, str) else None
        return found or self.keep(Mapped(address))

    def find(self, key: str) -> Mapped | None:
        """The one that is kept under this key."""
        return self._maps.get(key)

    def keep(self, mapped: Mapped) -> Mapped:
        """Watch this one; returns the one that was there before, if any."""
        with self._lock:
            found = self._maps.setdefault(mapped.key, mapped)
            if found is mapped:
                self._wake()
        return found

    def forget(self, mapped: Mapped) -> None:
        """Nobody gets this one any more."""
        with self._lock:
            if self._maps.get(mapped.key) is mapped:
                del self._maps[mapped.key]
                self._wake()

    def clear(self) -> None:
        """Forget all; the thread has ended afterwards."""
        with self._lock:
            thread = self._thread
            self._maps.clear()
            if thread is not None:
                self._wake()
        if thread is not None:
            thread.join()

    def _wake(self) -> None:
        """Have the thread look again, or start it. The lock is held."""
        if self._thread is None:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._watch, name="kvxfer-shm", daemon=True)
            self._thread.start()
        else:
            os.eventfd_write(self._wake_fd, 1)

    def _watch(self) -> None:
        while True:
            with self._lock:
                watched = {mapped.process for mapped in self._maps.values()}
                if not watched:
                    self._thread = None
                    os.close(self._wake_fd)
                    return
            if self._wait(watched):
                os.eventfd_read(self._wake_fd)
            gone = {process for process in watched if process.is_gone()}
            with self._lock:
                self._maps = {
                    key: mapped
                    for key, mapped in self._maps.items()
                    if mapped.process not in gone and (mapped.open or not self._looks)
                }

    def _wait(self, watched: set[_Process]) -> bool:
        """Until one of them ends, or `_wake`: then true."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        for process in watched:
            if process.pidfd >= 0:
                poll.register(process.pidfd, select.POLLIN)
        blind = self._looks or any(process.pidfd < 0 for process in watched)
        return any(fd == self._wake_fd for fd, _ in poll.poll(_POLL_MS if blind else None))


class Mapped:
    """One region of a peer. Unmapped when the last reference goes; views alone do not keep it."""

    has_blocks = True
    """Whether the blocks are there too, after the header and the generations."""

    def __init__(self, address: Address) -> None:
        self.region = self.key = text(address, "region")
        pid, fd_number = number(address, "pid"), number(address, "fd")
        self.process = _Process(pid, text(address, "start"))
        where, size = _map(f"/proc/{pid}/fd/{fd_number}")
        # Not at the interpreter's end: a thread may read then.
        weakref.finalize(self, pages.unmap, where, size).atexit = False
        self._adopt(where, size, f"descriptor {fd_number} of process {pid}")

    def _adopt(self, where: int, size: int, name: str) -> None:
        if size < PAGE_BYTES:
            raise PeerLost(f"{name} is no region")
        view = memoryview((ctypes.c_char * size).from_address(where)).cast("B").toreadonly()
        magic, _, self.num_blocks, self.block_bytes, _, id_ = HEADER.unpack_from(view)
        if magic != MAGIC or f"{id_:016x}" != self.region:
            raise PeerLost(f"{name} is no longer the region {self.region}")
        num_bytes = self.num_blocks * self.block_bytes if self.has_blocks else 0
        if size < data_offset(self.num_blocks) + num_bytes:
            raise BadDescriptor(f"{name} is too short for its blocks")
        self.head = view[: HEADER.size].cast("Q")
        """By the numbers of `kvxfer.region`: EPOCH, OPEN."""
        self.generations = view[PAGE_BYTES : PAGE_BYTES + 8 * self.num_blocks].cast("Q")
        self.address = where + data_offset(self.num_blocks)

    @property
    def epoch(self) -> int:
        """The owner's life."""
        return self.head[EPOCH]

    @property
    def open(self) -> bool:
        """False once the owner revoked the region."""
        return bool(self.head[OPEN])


class _Process:
    """A peer, told from others that get its id later. Raises PeerLost."""

    def __init__(self, pid: int, start: str) -> None:
        self.pid, self._start = pid, start
        self._polls: list[select.poll] = []
        self.pidfd = _open_pidfd(pid)
        if self.pidfd >= 0:
            weakref.finalize(self, os.close, self.pidfd).atexit = False
        if not start or start_time(pid) != start:
            raise PeerLost(f"process {pid} is gone")

    def is_gone(self) -> bool:
        """Whether it has ended."""
        if self.pidfd < 0:
            return start_time(self.pid) != self._start
        try:
            poll = self._polls.pop()  # threads cannot share one
        except IndexError:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
        gone = bool(poll.poll(0))
        self._polls.append(poll)
        return gone


def start_time(pid: int) -> str:
    """When the process began, in the kernel's ticks; "" if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - hot path
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _open_pidfd(pid: int) -> int:
    """-1 where the kernel or a sandbox has none."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise PeerLost(f"process {pid} is gone", errno=error.errno) from error
    except (OSError, OverflowError):
        return -1


def _map(path: str) -> tuple[int, int]:
    """(address, size) of a shared mapping that can only be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PeerLost(f"the peer's region: {error}", errno=error.errno) from error
    try:
        size = os.fstat(fd).st_size
        return pages.map_shared(fd, size, writable=False), size
    except OSError as error:
        raise PeerLost(f"the peer's region: {error.strerror}", errno=error.errno) from error
    finally:
        os.close(fd)
