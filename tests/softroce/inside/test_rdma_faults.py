"""Each fault ends in its own error within the configured time, and 200 of them leave nothing.

On one Soft-RoCE device; what needs a second machine (its link down, its reset) is in
test_two_rdma_losses.py.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvxfer import (
    AccessDenied,
    KVConsumer,
    KVLayout,
    KVProducer,
    PeerLost,
    Region,
    Revoked,
    TransferTimeout,
    TransportError,
)
from kvxfer.testing.checks import Holdings, holdings, settles
from kvxfer.testing.harness import LARGE, LAYOUTS
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.softroce.inside.counts import resources
from tests.softroce.inside.lab_hooks import own_link
from tests.softroce.inside.nursery import Nursery, kill

LAYOUT = LAYOUTS[0]
TIMEOUT_S = 10.0
SETTINGS = RdmaSettings(nics=("rxe0",), ib_timeout=14)
NUM_FAULTS = 200


class Ends:
    """Both ends in this process, eight blocks each."""

    def __init__(self, layout: KVLayout = LAYOUT) -> None:
        self.source, self.pool = Region(8, layout.block_bytes), Region(8, layout.block_bytes)
        self.source.buffer[:] = os.urandom(1 << 10) * (len(self.source.buffer) >> 10)
        self.way = RdmaTransport("open sesame", settings=SETTINGS)
        self.reader = RdmaTransport("open sesame", settings=SETTINGS)
        self.layout = layout
        self.producer = KVProducer(
            self.source, [self.way], layout=layout, producer="p#1", host="here", epoch=1
        )
        self.consumer = KVConsumer(self.pool, [self.reader], layout=layout)
        self.found = self.producer.pin("x", [1, 2], range(2 * layout.block_size))

    def pull(self, timeout_s: float = TIMEOUT_S) -> None:
        self.consumer.pull(self.found, [0, 1], timeout_s=timeout_s)
        assert self.pool.block(0) == self.source.block(1)
        assert self.pool.block(1) == self.source.block(2)

    def spoil_keys(self) -> None:
        (link,) = next(iter(self.reader._idle.values()))
        for source in link._sources.values():
            source.blocks[:] = [type(s)(s.address, s.key ^ 0xFF) for s in source.blocks]

    def close(self) -> None:
        self.consumer.close()
        self.producer.close()
        self.source.close()
        self.pool.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    found = Ends()
    yield found
    found.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(LAYOUT) as found:
        yield found


def fails(
    kind: type[TransportError], work: Callable[[], object], within_s: float
) -> TransportError:
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        work()
    assert time.monotonic() - start < within_s, "too late"
    return caught.value


def test_a_wrong_key_is_denied(ends: Ends) -> None:
    ends.pull()
    ends.spoil_keys()
    error = fails(AccessDenied, ends.pull, 2)
    assert "REM_ACCESS_ERR" in str(error) and error.errno == errno.EACCES
    ends.pull()


def test_a_revoked_region_cannot_be_read(ends: Ends) -> None:
    ends.pull()
    ends.source.revoke()
    fails(Revoked, ends.pull, 2)
    fails(Revoked, ends.pull, 2)


def test_a_region_that_is_revoked_in_mid_read_is_not_read() -> None:
    large = Ends(LARGE)
    large.pull()
    timer = threading.Timer(0.05, large.source.revoke)
    timer.start()
    fails(Revoked, lambda: [large.pull() for _ in range(100)], TIMEOUT_S)
    timer.join()
    large.close()


def test_a_killed_peer_is_lost(nursery: Nursery) -> None:
    pool = Region(8, LAYOUT.block_bytes)
    consumer = KVConsumer(pool, [RdmaTransport("open sesame", settings=SETTINGS)], layout=LAYOUT)
    pid, found = nursery.bear()
    consumer.pull(found, [0, 1])
    kill(pid)
    error = fails(PeerLost, lambda: consumer.pull(found, [0, 1], timeout_s=TIMEOUT_S), 3)
    assert error.errno
    consumer.close()


def test_our_own_link_down_is_said_and_the_next_read_is_well_again(ends: Ends) -> None:
    ends.pull()
    own_link(up=False)
    try:
        error = fails(TransportError, ends.pull, 3)
        assert "LOC_QP_OP_ERR" in str(error) and error.errno == errno.ENETDOWN
        fails(TransportError, ends.pull, 3)
    finally:
        own_link(up=True)
    assert settles(lambda: _reads(ends), 10)


def test_a_stopped_peer_that_we_do_not_know_yet_is_a_timeout(nursery: Nursery) -> None:
    consumer = KVConsumer(
        Region(8, LAYOUT.block_bytes),
        [RdmaTransport("open sesame", settings=SETTINGS)],
        layout=LAYOUT,
    )
    pid, found = nursery.bear()
    os.kill(pid, signal.SIGSTOP)
    fails(TransferTimeout, lambda: consumer.pull(found, [0, 1], timeout_s=0.5), 2)
    os.kill(pid, signal.SIGCONT)
    consumer.pull(found, [0, 1], timeout_s=TIMEOUT_S)
    consumer.close()
    kill(pid)


def test_two_hundred_faults_leave_nothing(nursery: Nursery) -> None:
    def held() -> Holdings:
        return holdings(resources())

    other, ways = Region(8, LAYOUT.block_bytes), RdmaTransport("open sesame", settings=SETTINGS)
    abroad = KVConsumer(other, [ways], layout=LAYOUT)
    ends = Ends()
    ends.pull()
    pid, found = nursery.bear()
    abroad.pull(found, [0, 1])
    kill(pid)
    fails(PeerLost, lambda: abroad.pull(found, [0, 1]), 3)
    ends.spoil_keys()
    fails(AccessDenied, ends.pull, 2)
    before = held()
    kinds: dict[str, int] = {}
    for turn in range(NUM_FAULTS):
        kind = ("killed", "wrong key", "own link", "revoked")[turn % 4]
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind == "killed":
            pid, found = nursery.bear()
            abroad.pull(found, [0, 1], timeout_s=TIMEOUT_S)
            kill(pid)
            fails(PeerLost, lambda f=found: abroad.pull(f, [0, 1], timeout_s=TIMEOUT_S), 3)
        elif kind == "wrong key":
            ends.pull()
            ends.spoil_keys()
            fails(AccessDenied, ends.pull, 2)
        elif kind == "own link":
            ends.pull()
            own_link(up=False)
            fails(TransportError, ends.pull, 3)
            own_link(up=True)
            assert settles(lambda: _reads(ends), 10)
            ends.spoil_keys()
            fails(AccessDenied, ends.pull, 2)
        else:
            _revoke_another(ends)
    assert settles(lambda: held() <= before), (kinds, before, held())
    ends.pull()
    ends.close()
    abroad.close()


def _revoke_another(ends: Ends) -> None:
    """A region beside the one that stays."""
    region = Region(8, LAYOUT.block_bytes)
    producer = KVProducer(region, [ends.way], layout=LAYOUT, producer="p#2", host="here", epoch=1)
    found = producer.pin("y", [1, 2], range(2 * LAYOUT.block_size))
    ends.consumer.pull(found, [2, 3], timeout_s=TIMEOUT_S)
    region.revoke()
    fails(Revoked, lambda: ends.consumer.pull(found, [2, 3], timeout_s=TIMEOUT_S), 2)
    region.close()


def _reads(ends: Ends) -> bool:
    try:
        ends.pull()
    except TransportError:
        return False
    return True
