"""The transports, and what each is held against."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvxfer.bench import limits
from kvxfer.bench.case import Case
from kvxfer.bench.race import Turn, timed
from kvxfer.bench.source import FILL, HOST, LOOPBACK, SECRET, Source, make_region
from kvxfer.consumer import KVConsumer
from kvxfer.descriptor import KVDescriptor
from kvxfer.errors import KVUsageError
from kvxfer.offers import available
from kvxfer.opening import open_transport
from kvxfer.producer import KVProducer
from kvxfer.region import DeviceRegion, Region

NAMES = ("mem", "shm", "tcp", "rdma", "cuda_ipc")
LIMIT_OF = {
    "mem": "memcpy",
    "shm": "memcpy",
    "tcp": "socket",
    "rdma": "ib_read_bw",
    "cuda_ipc": "peer copy",
}
_HOST_WAYS = ("shm", "tcp", "rdma")


@dataclass(frozen=True)
class Machine:
    """What this one has."""

    usable: tuple[str, ...]
    why_not: dict[str, str]
    source_device: str = ""
    device: str = ""
    """CUDA devices, of the producer and of the reader; "" where there is none."""


def look() -> Machine:
    """At this machine. Loads torch only where a driver of NVIDIA is."""
    devices = _cuda_devices()
    offers = {offer.name: offer for offer in available("cpu")}
    if devices:
        offers["cuda_ipc"] = next(o for o in available(devices[0]) if o.name == "cuda_ipc")
    why_not = {name: offer.why for name, offer in offers.items() if not offer.usable}
    if not devices:
        why_not["cuda_ipc"] = "no CUDA device"
    usable = tuple(name for name in NAMES if name not in why_not)
    return Machine(usable, why_not, *(devices[0], devices[-1]) if devices else ("", ""))


def wanted(machine: Machine, names: Sequence[str]) -> tuple[str, ...]:
    """Those to measure; all that can be without `names`. Raises KVUsageError."""
    for name in names:
        if name in machine.why_not:
            raise KVUsageError(f"{name} cannot be measured here: {machine.why_not[name]}")
        if name not in machine.usable:
            raise KVUsageError(f"there is no transport {name!r}; there are {', '.join(NAMES)}")
    return tuple(dict.fromkeys(names)) or machine.usable


@contextmanager
def entrants(case: Case, machine: Machine, names: Sequence[str]) -> Iterator[dict[str, Turn]]:
    """The transports and their limits, by name, ready to move bytes."""
    found: dict[str, Turn] = {}
    with contextlib.ExitStack() as stack:
        if host := [name for name in names if name in _HOST_WAYS]:
            source = stack.enter_context(Source(case, "cpu", host))
            mine = make_region(case.num_blocks, case.block_bytes, "cpu", 0)
            for name in host:
                found[name] = _puller(stack, case, name, mine, source.descriptors)
            if "tcp" in host:
                found["socket"] = timed(limits.socket_copy(case, source.port))
        if "mem" in names:
            mine = make_region(case.num_blocks, case.block_bytes, "cpu", 0)
            found["mem"] = _puller(stack, case, "mem", mine, _pinned_here(stack, case))
        if {"mem", "shm"} & set(names):
            found["memcpy"] = timed(limits.memory_copy(case))
        if "rdma" in names and (seconds := _ib_read(case)) is not None:
            found["ib_read_bw"] = _constant(seconds)
        if "cuda_ipc" in names:
            source = stack.enter_context(Source(case, machine.source_device, ["cuda_ipc"]))
            mine = make_region(case.num_blocks, case.block_bytes, machine.device, 0)
            found["cuda_ipc"] = _puller(stack, case, "cuda_ipc", mine, source.descriptors)
            copy = limits.peer_copy(case, machine.source_device, machine.device)
            found["peer copy"] = timed(copy)
        yield found


def _puller(
    stack: contextlib.ExitStack,
    case: Case,
    name: str,
    mine: Region,
    descriptors: Sequence[KVDescriptor],
) -> Turn:
    """Whole pulls: the read and its proof. What the first brought is looked at."""
    way = open_transport(name, host=HOST, secret=SECRET, listen_host=LOOPBACK)
    consumer = KVConsumer(mine, [way], layout=case.layout)
    stack.callback(consumer.close)
    into = [blocks for _, blocks in case.tables]

    def pull(turn: int) -> None:
        at = turn % len(into)
        consumer.pull(descriptors[at], into[at])

    pull(0)
    for block in into[0]:
        if bytes(mine.block(block)[-8:]) != bytes([FILL]) * 8:
            raise AssertionError(f"{name} brought other bytes")
    _blank(mine, into[0])
    return timed(pull)


def _blank(region: Region, blocks: Sequence[int]) -> None:
    for block in blocks:
        if isinstance(region, DeviceRegion):
            start = block * region.block_bytes
            region.tensor[start : start + region.block_bytes].zero_()
        else:
            region.block(block)[:] = bytes(region.block_bytes)


def _pinned_here(stack: contextlib.ExitStack, case: Case) -> list[KVDescriptor]:
    """Of a producer in this process."""
    region = make_region(case.num_blocks, case.block_bytes, "cpu", FILL)
    way = open_transport("mem", host=HOST, secret=SECRET, listen_host=LOOPBACK)
    producer = KVProducer(region, [way], layout=case.layout, producer="here", host=HOST)
    stack.callback(producer.close)
    tables = [source for source, _ in case.tables]
    return [producer.pin(str(i), table, range(len(table))) for i, table in enumerate(tables)]


def _ib_read(case: Case) -> float | None:
    """Seconds; None where the tool is not there."""
    from kvxfer.transports.rdma_settings import RdmaSettings

    settings = RdmaSettings.from_env()
    devices = settings.nics or tuple(sorted(os.listdir("/sys/class/infiniband")))  # noqa: PTH208
    try:
        return limits.ib_read_seconds(case, devices[0].partition(":")[0], settings.gid_index)
    except RuntimeError as error:
        print(f"rdma without its limit: {error}", file=sys.stderr)
        return None


def _constant(seconds: float) -> Turn:
    def turn(_: int) -> float:
        return seconds

    return turn


def _cuda_devices() -> list[str]:
    if not os.path.exists("/proc/driver/nvidia/version"):  # noqa: PTH110
        return []
    try:
        import torch
    except ImportError:
        return []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
