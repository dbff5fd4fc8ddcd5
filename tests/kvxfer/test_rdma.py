"""The suite over `rdma` with a binding that copies within this process, and faults on order.

What only a device shows is tested in virtual machines: tests/softroce.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from kvxfer import (
    AccessDenied,
    KVUsageError,
    PeerLost,
    Region,
    Revoked,
    TransferTimeout,
    Transport,
    TransportError,
    whole_blocks,
)
from kvxfer.testing import TransportSuite
from kvxfer.testing.checks import settles
from kvxfer.transports import rdma_staging
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.kvxfer.fake_device import DeferredCopies, FakeDeviceRegion, dmabuf_of
from tests.kvxfer.fake_verbs import Fabric

KINDS = ("Context", "PD", "MR", "DmaBufMR", "QP", "CQ", "CompChannel")


def made(fabric: Fabric, **settings: Any) -> RdmaTransport:
    return RdmaTransport(
        "open sesame",
        settings=RdmaSettings(**settings),
        verbs=fabric.verbs(),
        make_copies=DeferredCopies,
    )


class TestOneNic(TransportSuite):
    fabric = Fabric()

    def make(self) -> Transport:
        return made(self.fabric)

    def resources(self) -> Mapping[str, int]:
        return {kind: self.fabric.count(kind) for kind in KINDS}


class TestTwoNicsWithoutTheExtendedInterface(TestOneNic):
    fabric = Fabric("fake0", "fake1", extended=False, most_message=4096)


class TestStagedSource(TestOneNic):
    """The producer's blocks are on a device that no NIC reaches."""

    fabric = Fabric("fake0", "fake1")

    @pytest.fixture(autouse=True)
    def small_slots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rdma_staging, "SLOT_BYTES", 9000)
        monkeypatch.setattr("kvxfer.transports.rdma_memory.export_dmabuf", dmabuf_of)

    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeDeviceRegion(num_blocks, block_bytes)

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return Region(num_blocks, block_bytes)

    def read_block(self, region: Region, block_id: int) -> bytes:
        return bytes(region.block(block_id))

    def write_block(self, region: Region, block_id: int, data: bytes) -> None:
        region.block(block_id)[:] = data


class TestStagedDestination(TestStagedSource):
    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        return Region(num_blocks, block_bytes)

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeDeviceRegion(num_blocks, block_bytes)


class TestStagedAtBothEnds(TestStagedSource):
    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeDeviceRegion(num_blocks, block_bytes)


class TestThroughDmabuf(TestStagedAtBothEnds):
    fabric = Fabric("fake0", "fake1", dmabuf=True)


# --- faults


class Ends:
    """A producer and a reader over a fabric of their own."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.fabric = Fabric(*names)
        self.source, self.destination = Region(64, 65536), Region(64, 65536)
        for block in range(64):
            self.source.block(block)[:] = bytes([block]) * 65536
        self.producer, self.reader = made(self.fabric), made(self.fabric, **settings)
        self.address = self.producer.serve(self.source)

    def read(self, count: int = 64, timeout_s: float = 5.0, **changed: Any) -> None:
        plan = whole_blocks(range(count), range(count - 1, -1, -1), 65536)
        self.destination.buffer[: count * 65536] = bytes(count * 65536)
        self.reader.read({**self.address, **changed}, plan, self.destination, timeout_s)
        for block in range(count):
            assert self.destination.block(count - 1 - block) == self.source.block(block)

    def counts(self) -> dict[str, int]:
        return {kind: self.fabric.count(kind) for kind in KINDS}

    def close(self) -> None:
        self.reader.close()
        self.producer.close()
        assert self.fabric.open == []


@pytest.mark.parametrize(
    ("status", "kind", "number", "named"),
    [
        (2, TransportError, errno.ENETDOWN, "LOC_QP_OP_ERR"),
        (4, TransportError, errno.EFAULT, "LOC_PROT_ERR"),
        (10, AccessDenied, errno.EACCES, "REM_ACCESS_ERR"),
        (12, PeerLost, errno.ETIMEDOUT, "RETRY_EXC_ERR"),
        (20, TransferTimeout, errno.ETIMEDOUT, "RESP_TIMEOUT_ERR"),
    ],
)
@pytest.mark.parametrize("good_chains", [0, 2])
def test_a_failed_read_ends_its_connection(
    status: int, kind: type[TransportError], number: int, named: str, good_chains: int
) -> None:
    ends = Ends()
    fresh = ends.counts()
    ends.fabric.fail.extend([0] * good_chains + [status])
    with pytest.raises(kind, match=named) as caught:
        ends.read()
    assert type(caught.value) is kind and caught.value.errno == number
    kept = {**fresh, "MR": fresh["MR"] + 1}  # the destination stays registered
    assert settles(lambda: ends.counts() == kept), (kept, ends.counts())
    ends.read()
    ends.close()


def test_a_wrong_key_is_denied() -> None:
    ends = Ends()
    ends.read()
    (link,) = next(iter(ends.reader._idle.values()))
    for source in link._sources.values():
        source.blocks[:] = [type(spot)(spot.address, spot.key ^ 1) for spot in source.blocks]
    with pytest.raises(AccessDenied, match="REM_ACCESS_ERR"):
        ends.read()
    ends.read()
    ends.close()


def test_a_revoked_region_is_deregistered_before_revoke_returns() -> None:
    ends = Ends()
    ends.read()
    before = ends.fabric.count("MR")
    ends.source.revoke()
    assert ends.fabric.count("MR") == before - 2
    with pytest.raises(Revoked):
        ends.read()
    with pytest.raises(Revoked):
        ends.read()
    with pytest.raises(KVUsageError, match="revoked"):
        ends.producer.serve(ends.source)
    ends.close()


def test_no_completion_is_a_timeout() -> None:
    ends = Ends()
    ends.read()
    ends.fabric.hang = True
    start = time.monotonic()
    with pytest.raises(TransferTimeout):
        ends.read(timeout_s=0.3)
    assert 0.25 < time.monotonic() - start < 2
    ends.fabric.hang = False
    ends.read()
    ends.close()


def test_a_producer_that_leaves_in_mid_read_is_noticed_before_the_time() -> None:
    ends = Ends()
    ends.read()
    ends.fabric.hang = True
    timer = threading.Timer(0.1, ends.producer.close)
    timer.start()
    start = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        ends.read(timeout_s=30)
    assert caught.value.errno == errno.ECONNRESET
    assert time.monotonic() - start < 10
    timer.join()
    ends.close()


def test_a_stranger_learns_nothing() -> None:
    ends = Ends()
    stranger = RdmaTransport("barley", settings=RdmaSettings(), verbs=ends.fabric.verbs())
    plan = whole_blocks([0], [0], 65536)
    before = ends.fabric.count("QP")
    with pytest.raises(AccessDenied):
        stranger.read(ends.address, plan, ends.destination, 5)
    assert ends.fabric.count("QP") == before
    stranger.close()
    ends.close()


def test_close_waits_for_nobody_and_leaves_nothing() -> None:
    ends = Ends()
    ends.read()
    ends.fabric.hang = True
    raised: list[BaseException] = []

    def read() -> None:
        try:
            ends.read(timeout_s=0.5)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=read)
    posted = len(ends.fabric.posted)
    thread.start()
    assert settles(lambda: len(ends.fabric.posted) > posted)
    ends.reader.close()
    assert ends.fabric.count("QP") > 0  # the one that reads
    thread.join(10)
    assert [type(error) for error in raised] == [TransferTimeout]
    with pytest.raises(KVUsageError, match="closed"):
        ends.read()
    ends.close()


def test_a_destination_that_is_gone_is_deregistered() -> None:
    ends = Ends()
    before = ends.fabric.count("MR")
    ends.read()
    (idle,) = next(iter(ends.reader._idle.values()))
    idle.close()
    ends.reader._idle.clear()
    assert ends.fabric.count("MR") == before + 1
    ends.destination.close()
    assert ends.fabric.count("MR") == before
    ends.close()


def test_all_nics_share_a_read_and_one_proves_it() -> None:
    ends = Ends("a", "b", "c")
    ends.read(64)
    shares: dict[str, int] = {}
    for nic, chain in ends.fabric.posted:
        shares[nic] = shares.get(nic, 0) + sum(size for size, _ in chain)
    assert sorted(shares) == ["a", "b", "c"]
    assert min(shares.values()) >= 1 << 20
    assert sum(shares.values()) > 64 * 65536  # the blocks, and the proof
    assert ends.fabric.posted[-1][0] == "a" and ends.fabric.posted[-1][1][-1][0] < 65536
    ends.close()


def test_ends_with_different_numbers_of_nics() -> None:
    for ours, theirs in (("a", "b"), ("a",)), (("a",), ("a", "b", "c")):
        fabric = Fabric("a", "b", "c")
        source, destination = Region(8, 1 << 20), Region(8, 1 << 20)
        source.buffer[:] = bytes(range(256)) * (8 << 12)
        producer, reader = made(fabric, nics=theirs), made(fabric, nics=ours)
        address = producer.serve(source)
        assert address["nics"] == list(theirs)
        reader.read(address, whole_blocks(range(8), range(8), 1 << 20), destination, 5)
        assert destination.buffer == source.buffer
        assert fabric.count("QP") == 2 * max(len(ours), len(theirs))
        reader.close()
        producer.close()
        assert fabric.open == []


def test_neighbouring_blocks_are_one_request() -> None:
    ends = Ends()
    plan = whole_blocks([4, 5, 6, 9], [0, 1, 2, 3], 65536)
    ends.reader.read(ends.address, plan, ends.destination, 5)
    (_, data), (_, proof) = ends.fabric.posted
    assert [size for size, _ in data] == [3 * 65536, 65536] and len(proof) == 1
    ends.close()


def test_keys_and_addresses_are_told_over_the_control_connection_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    ends = Ends()
    ends.read()
    ends.fabric.fail.append(10)
    with pytest.raises(AccessDenied) as caught:
        ends.read()
    (source,) = ends.producer._server._offers.values()  # type: ignore[union-attr]
    ends.read()
    (link,) = next(iter(ends.reader._idle.values()))
    shown = json.dumps(ends.address) + caplog.text + str(caught.value) + repr(link._sources)
    secrets = [(spot.address, spot.key) for spot in source._blocks.spots + source._proof.spots]  # type: ignore[union-attr]
    for address, key in secrets:
        assert str(address) not in shown and f"{address:x}" not in shown
        assert f"key={key}" not in shown
    assert set(ends.address) == {"host", "port", "region", "nics"}
    ends.close()
