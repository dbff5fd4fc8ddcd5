"""What the machine itself can do, measured beside the transports."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import shutil
import socket
import subprocess
from collections.abc import Callable

from kvxfer.bench.case import Case
from kvxfer.bench.source import LOOPBACK

Copy = Callable[[int], object]


def memory_copy(case: Case) -> Copy:
    """One memcpy between ordinary buffers, by one thread."""
    buffers = [ctypes.create_string_buffer(case.pool_bytes) for _ in range(2)]
    source, target = map(ctypes.addressof, buffers)
    for address in (source, target):
        ctypes.memset(address, 1, case.pool_bytes)
    move, size = ctypes.memmove, case.num_bytes

    def copy(turn: int, buffers: object = buffers) -> None:
        start = case.offset(turn)
        move(target + start, source + start, size)

    return copy


def socket_copy(case: Case, port: int) -> Copy:
    """A plain socket: one request, one recv_into loop, contiguous at both ends."""
    sock = socket.create_connection((LOOPBACK, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    target, size = memoryview(mmap.mmap(-1, case.pool_bytes)), case.num_bytes

    def copy(turn: int) -> None:
        start = case.offset(turn)
        sock.sendall(start.to_bytes(8, "big") + size.to_bytes(8, "big"))
        view = target[start : start + size]
        while len(view):
            view = view[sock.recv_into(view) :]

    return copy


def peer_copy(case: Case, source_device: str, device: str) -> Copy:
    """One contiguous copy from device to device, from its call to its end."""
    import torch

    source, target = (
        torch.zeros(case.pool_bytes, dtype=torch.uint8, device=where)
        for where in (source_device, device)
    )

    def copy(turn: int) -> None:
        start = case.offset(turn)
        target[start : start + case.num_bytes].copy_(source[start : start + case.num_bytes])
        torch.cuda.synchronize(source_device)
        torch.cuda.synchronize(device)

    return copy


def ib_read_seconds(case: Case, device: str, gid_index: int | None, port: int = 18_515) -> float:
    """Seconds that `ib_read_bw` would take for a transfer, with requests of one block, between two
    processes of this machine. Raises RuntimeError with its words where it cannot."""
    program = shutil.which("ib_read_bw")
    if program is None:
        raise RuntimeError("ib_read_bw is not installed: apt-get install perftest")
    words = [program, "-d", device, "-s", str(case.block_bytes), "-p", str(port), "-F"]
    if gid_index is not None:
        words += ["-x", str(gid_index)]
    # A slow device gives no figure at all for a time, a fast one a rough one for few requests.
    seconds = _ib_seconds([*words, "-n", str(max(5, case.num_bytes // case.block_bytes))], case)
    return seconds if seconds > 0.2 else _ib_seconds([*words, "-D", "2"], case)


def _ib_seconds(words: list[str], case: Case) -> float:
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            return case.num_bytes / _ask_ib(words, server)
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()


def _ask_ib(words: list[str], server: subprocess.Popen[bytes]) -> float:
    """Until the server listens the client is refused."""
    for _ in range(50):
        done = subprocess.run([*words, LOOPBACK], capture_output=True, text=True, timeout=60)
        if found := bytes_per_second(done.stdout):
            return found
        if server.poll() is not None:
            break
    raise RuntimeError(f"ib_read_bw: {(done.stderr or done.stdout).strip()[-300:]}")


def bytes_per_second(printed: str) -> float | None:
    """The average out of ib_read_bw's table, whose unit (MB: 2**20 bytes, or Gb) its head tells."""
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+[\d.]+", printed, re.MULTILINE)
    unit = re.search(r"BW average\[(\w+)/sec\]", printed)
    if not rows or unit is None:
        return None
    return float(rows[-1][3]) * {"MB": 1 << 20, "MiB": 1 << 20, "Gb": 1e9 / 8}[unit[1]]
