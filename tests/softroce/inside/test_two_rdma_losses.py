"""What befalls the other machine or the cable, as the reader sees it, within the configured time.

The wait for an answer is 4.096 µs · 2^KVCACHE_IB_TIMEOUT for each of seven tries: with 14 half a
second in all, with 17 about four.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator

import pytest

from kvxfer import KVConsumer, KVDescriptor, PeerLost, Region, TransferTimeout, TransportError
from kvxfer.testing import peers
from kvxfer.testing.checks import holdings, settles
from kvxfer.testing.harness import LAYOUTS
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.softroce.inside.counts import resources
from tests.softroce.inside.lab_hooks import LAB, Peer, own_link
from tests.softroce.inside.test_two_rdma import PEER_CODE

LAYOUT = LAYOUTS[0]
ONES = b"\x01" * LAYOUT.block_bytes
TRIES_S = {14: 7 * 4.096e-6 * 2**14, 17: 7 * 4.096e-6 * 2**17}


class Reader:
    """On this machine; the producer is on the other."""

    def __init__(self, ib_timeout: int) -> None:
        settings = RdmaSettings(nics=("rxe0",), ib_timeout=ib_timeout)
        self.pool = Region(8, LAYOUT.block_bytes)
        way = RdmaTransport("open sesame", settings=settings)
        self.consumer = KVConsumer(self.pool, [way], layout=LAYOUT)

    def pull(self, found: KVDescriptor, timeout_s: float) -> None:
        self.consumer.pull(found, [0, 1], timeout_s=timeout_s)
        assert self.pool.block(0) == ONES

    def close(self) -> None:
        self.consumer.close()
        self.pool.close()


@pytest.fixture
def reader() -> Iterator[Reader]:
    found = Reader(14)
    yield found
    found.close()


def produce() -> tuple[Peer, KVDescriptor]:
    peer = LAB.python(peers.producer_code(PEER_CODE, LAYOUT))
    return peer, KVDescriptor.from_json(peer.line())


def fails(
    kind: tuple[type[TransportError], ...], work: Callable[[], object], within_s: float
) -> TransportError:
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        work()
    took = time.monotonic() - start
    print(f"{type(caught.value).__name__} after {took:.2f} s: {caught.value}")
    assert took < within_s, "too late"
    return caught.value


def well_again(reader: Reader, found: KVDescriptor) -> bool:
    try:
        reader.pull(found, 5)
    except TransportError:
        return False
    return True


def test_a_killed_peer_is_lost(reader: Reader) -> None:
    peer, found = produce()
    reader.pull(found, 10)
    peer.kill()
    assert fails((PeerLost,), lambda: reader.pull(found, 10), 2).errno


def test_the_peers_cable_is_pulled(reader: Reader) -> None:
    peer, found = produce()
    with peer:
        reader.pull(found, 10)
        LAB.plug("other", up=False)
        try:
            error = fails((PeerLost,), lambda: reader.pull(found, 10), TRIES_S[14] + 2)
            assert "RETRY_EXC_ERR" in str(error) and error.errno == errno.ETIMEDOUT
        finally:
            LAB.plug("other", up=True)
        assert settles(lambda: well_again(reader, found), 30)


def test_less_time_than_the_tries_take_is_a_timeout() -> None:
    reader = Reader(17)
    peer, found = produce()
    with peer:
        reader.pull(found, 10)
        LAB.plug("other", up=False)
        try:
            fails((TransferTimeout,), lambda: reader.pull(found, 0.5), 1.5)
        finally:
            LAB.plug("other", up=True)
        assert settles(lambda: well_again(reader, found), 30)
    reader.close()


def test_our_own_link_is_down(reader: Reader) -> None:
    peer, found = produce()
    with peer:
        reader.pull(found, 10)
        own_link(up=False)
        try:
            error = fails((TransportError,), lambda: reader.pull(found, 10), TRIES_S[14] + 2)
            assert "LOC_QP_OP_ERR" in str(error) and error.errno == errno.ENETDOWN
        finally:
            own_link(up=True)
        assert settles(lambda: well_again(reader, found), 30)


def test_the_other_machine_is_reset(reader: Reader) -> None:
    _, found = produce()
    reader.pull(found, 10)
    LAB.reset_other()
    fails((PeerLost, TransferTimeout), lambda: reader.pull(found, 10), TRIES_S[14] + 2)
    LAB.wait_other()
    peer, found = produce()
    with peer:
        assert settles(lambda: well_again(reader, found), 30)


def test_losses_leave_nothing(reader: Reader) -> None:
    peer, found = produce()
    with peer:
        reader.pull(found, 10)
        before = holdings(resources())
        for _ in range(10):
            LAB.plug("other", up=False)
            fails((PeerLost,), lambda: reader.pull(found, 10), TRIES_S[14] + 2)
            LAB.plug("other", up=True)
            assert settles(lambda: well_again(reader, found), 30)
        assert settles(lambda: holdings(resources()) <= before), (before, holdings(resources()))
