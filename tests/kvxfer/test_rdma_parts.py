"""The parts of `rdma`: settings, devices, endings, chains, the flow over several lanes."""

from __future__ import annotations

import errno
import json
import logging
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from kvxfer import (
    AccessDenied,
    BadDescriptor,
    KVUsageError,
    PeerLost,
    Region,
    TransferTimeout,
    TransportError,
    errors,
)
from kvxfer.errors import UnusableTransport
from kvxfer.region import HEADER, PAGE_BYTES
from kvxfer.transports import rdma_verbs
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_device import Spot, close_each, ipv4_gid_index, open_devices
from kvxfer.transports.rdma_flow import Supply
from kvxfer.transports.rdma_link import proof_pieces
from kvxfer.transports.rdma_memory import heard_spots, told_spots
from kvxfer.transports.rdma_queue import LEAST_BYTES, MOST_BYTES, Queue, _Chain
from kvxfer.transports.rdma_settings import RdmaSettings, interface_address
from kvxfer.transports.rdma_staging import carried, slots_of
from kvxfer.transports.rdma_status import ENDINGS, status_error
from kvxfer.transports.rdma_verbs import FENCE, SIGNALED
from tests.kvxfer.fake_verbs import Fabric

# --- settings


def test_settings_come_from_the_environment() -> None:
    found = RdmaSettings.from_env(
        {
            "KVCACHE_RDMA_NICS": "mlx5_0, mlx5_1:2,",
            "KVCACHE_RDMA_GID_INDEX": "5",
            "KVCACHE_IB_TIMEOUT": "14",
            "KVCACHE_RELAX_ORDERING": "1",
            "KVCACHE_SOCKET_IFNAME": "eth0",
        }
    )
    assert found == RdmaSettings(
        nics=("mlx5_0", "mlx5_1:2"),
        gid_index=5,
        ib_timeout=14,
        relax_ordering=True,
        socket_ifname="eth0",
    )


def test_settings_without_an_environment() -> None:
    found = RdmaSettings.from_env({"KVCACHE_RDMA_NICS": "", "KVCACHE_IB_TIMEOUT": ""})
    assert found == RdmaSettings()
    assert (found.ib_timeout, found.retry_count, found.relax_ordering) == (18, 6, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KVCACHE_RDMA_NICS", ","),
        ("KVCACHE_RDMA_GID_INDEX", "three"),
        ("KVCACHE_RDMA_GID_INDEX", "256"),
        ("KVCACHE_IB_TIMEOUT", "0"),
        ("KVCACHE_IB_TIMEOUT", "32"),
        ("KVCACHE_IB_TIMEOUT", "1.5"),
        ("KVCACHE_RELAX_ORDERING", "maybe"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(KVUsageError, match=name):
        RdmaSettings.from_env({name: value})


def test_endless_retries_are_refused() -> None:
    with pytest.raises(KVUsageError, match="at most 6"):
        RdmaSettings(retry_count=7)


def test_the_address_of_an_interface() -> None:
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(KVUsageError, match="KVCACHE_SOCKET_IFNAME"):
        interface_address("nowhere0")


# --- endings


def test_every_ending_is_an_error_with_a_number() -> None:
    for status, ending in ENDINGS.items():
        error = status_error(status, "mlx5_0")
        assert type(error) is ending.kind and isinstance(error, TransportError)
        assert ending.name in str(error) and "mlx5_0" in str(error)
        assert error.errno in errno.errorcode


@pytest.mark.parametrize(
    ("status", "kind", "number"),
    [
        (2, TransportError, errno.ENETDOWN),
        (10, AccessDenied, errno.EACCES),
        (12, PeerLost, errno.ETIMEDOUT),
        (20, TransferTimeout, errno.ETIMEDOUT),
        (99, TransportError, errno.EIO),
    ],
)
def test_what_endings_mean(status: int, kind: type[TransportError], number: int) -> None:
    error = status_error(status, "mlx5_0")
    assert type(error) is kind and error.errno == number


# --- the binding and the devices


def test_without_pyverbs_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    for name in [name for name in sys.modules if name.startswith("pyverbs.")]:
        monkeypatch.setitem(sys.modules, name, None)
    rdma_verbs.load.cache_clear()
    with pytest.raises(UnusableTransport, match="rdma needs pyverbs") as caught:
        RdmaTransport("s", settings=RdmaSettings())
    assert isinstance(caught.value, KVUsageError)
    assert "ibv_devices" in str(caught.value) and caught.value.remedy in str(caught.value)
    assert "install" in caught.value.remedy or "ln -s" in caught.value.remedy


def test_without_a_device_it_is_said_what_is_missing() -> None:
    with pytest.raises(UnusableTransport, match="ibv_devices"):
        open_devices(Fabric("").verbs(), RdmaSettings())


def test_a_device_that_was_named_must_be_usable() -> None:
    fabric = Fabric("a", "b")
    fabric.down = {"b"}
    assert [device.nic for device in open_devices(fabric.verbs(), RdmaSettings())] == ["a"]
    with pytest.raises(UnusableTransport, match="b: the port is not up"):
        open_devices(fabric.verbs(), RdmaSettings(nics=("a", "b")))
    with pytest.raises(KVUsageError, match="no c among a, b"):
        open_devices(fabric.verbs(), RdmaSettings(nics=("a", "c")))
    with pytest.raises(UnusableTransport, match="a:7"):
        open_devices(fabric.verbs(), RdmaSettings(nics=("a:7",)))
    fabric.down = {"a", "b"}
    with pytest.raises(UnusableTransport, match="a: the port is not up"):
        open_devices(fabric.verbs(), RdmaSettings())
    assert fabric.count("Context") == fabric.count("PD") == 1  # those of the first


def test_the_gid_is_the_routable_one(tmp_path: Path) -> None:
    folder = tmp_path / "mlx5_0" / "ports" / "1"
    (folder / "gids").mkdir(parents=True)
    (folder / "gid_attrs" / "types").mkdir(parents=True)
    link = "fe80:0000:0000:0000:0e42:a1ff:fe00:0001"
    mapped = "0000:0000:0000:0000:0000:ffff:c0a8:0a01"
    table = [(link, "IB/RoCE v1"), (link, "RoCE v2"), (mapped, "IB/RoCE v1"), (mapped, "RoCE v2")]
    for index, (gid, kind) in enumerate(table, 8):
        (folder / "gids" / str(index)).write_text(gid + "\n")
        (folder / "gid_attrs" / "types" / str(index)).write_text(kind + "\n")
    assert ipv4_gid_index("mlx5_0", 1, str(tmp_path)) == 11
    assert ipv4_gid_index("mlx5_0", 2, str(tmp_path)) == 3
    (folder / "gid_attrs" / "types" / "11").unlink()
    assert ipv4_gid_index("mlx5_0", 1, str(tmp_path)) == 3


def test_relaxed_ordering_is_for_blocks_alone() -> None:
    fabric = Fabric()
    way = RdmaTransport("s", settings=RdmaSettings(relax_ordering=True), verbs=fabric.verbs())
    region = Region(2, 4096)
    way.serve(region)
    relaxed = {key.num_bytes: bool(key.access >> 20) for key in fabric.keys.values()}
    assert relaxed == {2 * PAGE_BYTES: False, region.num_bytes: True}
    way.close()


# --- chains


def chains(
    pieces: list[tuple[int, int, int]], most_bytes: int, most_requests: int, share_bytes: int
) -> list[list[tuple[int, int, int]]]:
    supply, found = Supply(pieces, most_bytes), []
    while not supply.is_empty:
        found.append(supply.take(most_requests, share_bytes))
    assert supply.take(most_requests, share_bytes) == []
    return found


def test_pieces_become_chains() -> None:
    pieces = [(0, 100, 10), (9, 9, 0), (50, 0, 25), (200, 300, 1)]
    assert chains(pieces, 10, 100, 1000) == [
        [(0, 100, 10), (50, 0, 10), (60, 10, 10), (70, 20, 5), (200, 300, 1)]
    ]
    assert chains(pieces, 100, 2, 1000) == [[(0, 100, 10), (50, 0, 25)], [(200, 300, 1)]]
    assert chains(pieces, 100, 100, 20) == [
        [(0, 100, 10), (50, 0, 20)],
        [(70, 20, 5), (200, 300, 1)],
    ]
    assert chains([], 1, 1, 1) == chains([(5, 5, 0)], 1, 1, 1) == []


def test_chains_are_as_long_as_the_link_is_fast() -> None:
    fabric = Fabric()
    (device,) = open_devices(fabric.verbs(), RdmaSettings())
    queue = Queue(device)
    first = queue.chain_bytes
    queue._end(_Chain(1, first, time.monotonic() - 0.5))
    assert queue.chain_bytes == LEAST_BYTES
    queue._ended_at = 0
    for _ in range(20):
        queue._end(_Chain(1, MOST_BYTES, time.monotonic()))
    assert queue.chain_bytes == MOST_BYTES
    queue._end(_Chain(2, 100, time.monotonic() - 1))  # tells nothing of the link
    assert queue.chain_bytes == MOST_BYTES
    close_each([queue, device])


def test_the_proof_is_read_in_few_pieces() -> None:
    first = PAGE_BYTES
    assert proof_pieces([0, 3], 100) == [(0, 0, first + 32)]
    far = [5, 4096, 4097, 99999]
    assert proof_pieces(far[::-1], 100) == [
        (0, 0, first + 48),
        (first + 32768, first + 32768, 16),
        (first + 8 * 99999, first + 8 * 99999, 8),
    ]
    assert proof_pieces(far, 2) == [(0, 0, first + 8 * 100000)]
    assert proof_pieces([9999], 9) == [(0, 0, HEADER.size), (first + 79992, first + 79992, 8)]


def test_slots_hold_what_fits() -> None:
    pieces = [(0, 1000, 100), (500, 0, 250)]
    assert slots_of(pieces, 200) == [
        [(0, 1000, 100), (500, 0, 100)],
        [(600, 100, 150)],
    ]
    chunk = [(0, 1000, 100), (500, 0, 50)]
    assert carried(chunk, 7, 9) == [(7, 9, 150)]
    assert carried(chunk, 7, None) == [(7, 1000, 100), (107, 0, 50)]
    assert carried(chunk, None, 9) == [(0, 9, 100), (500, 109, 50)]


@pytest.mark.parametrize("extended", [True, False])
def test_only_the_last_of_a_chain_is_signalled(extended: bool) -> None:
    fabric = Fabric(extended=extended)
    (device,) = open_devices(fabric.verbs(), RdmaSettings())
    here, there = Queue(device), Queue(device)
    here.connect(there.end, RdmaSettings())
    there.connect(here.end, RdmaSettings())
    assert here.extended is extended
    memory = Region(1, 4096)
    mr = device.register(memory.address, 4096, 7)
    spot = Spot(memory.address, mr.rkey)
    room = here.room
    here.post([(0, 64, 8), (8, 72, 8), (16, 80, 8)], spot, spot)
    here.post([(0, 64, 8)], spot, spot, after_all=True)
    here.post([(0, 64, 8), (8, 72, 8)], spot, spot, after_all=True)
    assert [flags for _, chain in fabric.posted for _, flags in chain] == [
        *(0, 0, SIGNALED),
        FENCE | SIGNALED,
        *(FENCE, SIGNALED),
    ]
    assert here.room == room - 6 and here.num_chains == 3
    assert here.poll() and here.room == room and here.num_chains == 0
    close_each([mr, here, there, device])
    assert fabric.open == []


def test_an_end_of_nonsense_is_refused() -> None:
    fabric = Fabric()
    (device,) = open_devices(fabric.verbs(), RdmaSettings())
    queue = Queue(device)
    good = queue.end
    nonsense: list[object] = [None, -1, 1 << 40, "x", []]
    for name in good:
        for value in nonsense:
            with pytest.raises(BadDescriptor):
                queue.connect({**good, name: value}, RdmaSettings())
    close_each([queue, device])


def test_spots_of_nonsense_are_refused() -> None:
    good = [Spot(4096, 7), Spot(0, 0)]
    assert heard_spots(json.loads(json.dumps(told_spots(good)))) == good
    wrong: list[object] = [None, 5, [1], [[1]], [[1, 2, 3]], [[-1, 2]], [[1, 1 << 32]], [["1", 2]]]
    for message in wrong:
        with pytest.raises(BadDescriptor):
            heard_spots(message)


def test_what_fails_to_close_keeps_nothing_open() -> None:
    closed: list[int] = []

    class One:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self) -> None:
            closed.append(self.number)
            if self.number == 2:
                raise errors.TransportError("no")

    with pytest.raises(TransportError):
        close_each([One(1), One(2), One(3)])
    assert closed == [3, 2, 1]
    assert all(a > b for a, b in pairwise(closed))


def test_secrets_of_memory_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert "4096" not in repr(Spot(4096, 7777)) and "7777" not in str(Spot(4096, 7777))
