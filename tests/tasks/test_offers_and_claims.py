"""Both main processes' ends of a hand-off, over a registry in memory and the real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pdbatch.engine.handoff import MemoryRegistry
from pdbatch.engine.messages import Adopt, EngineInfo, Handoff, PullFailed
from pdbatch.formats import encode_spec
from pdbatch.ids import JobId, WorkerId, request_key
from pdbatch.request import RequestSpec
from pdbatch.store import IngestRow, NewJob, Store
from tasks.worker.claims import Claims
from tasks.worker.offers import Offers
from tasks.worker.room import Room

INFO = EngineInfo(
    model="m",
    role="decode",
    device="cpu",
    dtype="float32",
    max_model_len=100,
    block_size=16,
    num_blocks=1000,
    block_bytes=10,
    layout="l",
    transports=[],
    pid=1,
)


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll until true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def fail_test(error: BaseException) -> None:
    raise AssertionError("a loop broke") from error


class Producer:
    """Offers, and what they told their worker."""

    def __init__(self, registry: MemoryRegistry, store: Store, worker: WorkerId) -> None:
        self.left: list[str] = []
        self.unpinned: list[str] = []
        self.failed: list[str] = []
        self.offers = Offers(
            registry,
            store,
            worker=lambda: worker,
            host="h",
            lease_s=30.0,
            unpin=self.unpinned.extend,
            on_left=self.left.extend,
            on_failed=lambda key, reason: self.failed.append(key),
            on_bug=fail_test,
        )

    def offer(self, *keys: str) -> None:
        self.offers.take([Handoff(key, f"{key}/1", b"descriptor", 100) for key in keys])


class Consumer:
    """Claims, and what they gave their engine."""

    def __init__(self, registry: MemoryRegistry, store: Store, worker: WorkerId) -> None:
        self.adopted: list[str] = []
        self.may_claim = threading.Event()
        self.may_claim.set()
        self.room = Room(INFO, 100)
        self.claims = Claims(
            registry,
            store,
            self.room,
            worker=lambda: worker,
            taking=threading.Lock(),
            host="h",
            lease_s=5.0,
            claim_bytes=10_000,
            may_claim=self.may_claim.is_set,
            adopt=self._adopt,
            on_bug=fail_test,
        )

    def _adopt(self, command: Adopt) -> None:
        self.adopted += [item.handoff_id for item in command.items]


@pytest.fixture
def job(store: Store) -> JobId:
    """A running job of four requests, whose shard a prefill worker has claimed."""
    job = store.jobs.create(NewJob(model="m"))
    with store.ingest(job, shard_size=4, default_model="m") as ingest:
        for index in range(4):
            body = encode_spec(RequestSpec(prompt=str(index)))
            ingest.add(IngestRow(index, f"r{index}", None, body))
    return job


@pytest.fixture
def workers(store: Store, job: JobId) -> list[WorkerId]:
    """A prefill worker that has claimed the shard, and two decode workers."""
    prefill = store.workers.register("p", "h", "prefill", "m")
    (message,) = store.shards.take_for_publish("m", 0, 10)
    assert store.shards.claim(prefill, *message) is not None
    return [prefill, *(store.workers.register(f"d{i}", "h", "decode", "m") for i in (1, 2))]


@pytest.fixture
def registry() -> MemoryRegistry:
    return MemoryRegistry()


@pytest.fixture
def producer(registry: MemoryRegistry, store: Store, workers: list[WorkerId]) -> Iterator[Producer]:
    found = Producer(registry, store, workers[0])
    yield found
    found.offers.stop()


@pytest.fixture
def consumer(registry: MemoryRegistry, store: Store, workers: list[WorkerId]) -> Iterator[Consumer]:
    found = Consumer(registry, store, workers[1])
    yield found
    found.claims.stop()


def test_what_is_pulled_is_unpinned_and_leaves(
    producer: Producer, consumer: Consumer, store: Store, job: JobId, workers: list[WorkerId]
) -> None:
    keys = [request_key(job, i) for i in range(3)]
    producer.offer(*keys)
    wait_for(lambda: len(consumer.adopted) == 3)
    assert set(store.holds.owners([(job, i) for i in range(3)]).values()) == {workers[1]}
    consumer.claims.pulled(consumer.adopted)
    wait_for(lambda: len(producer.left) == 3)
    assert sorted(producer.left) == sorted(keys)
    assert sorted(producer.unpinned) == sorted(consumer.adopted)
    assert len(producer.offers) == len(consumer.claims) == 0


def test_a_failed_pull_goes_back_to_its_producer_and_its_hold_ends(
    producer: Producer, consumer: Consumer, store: Store, job: JobId
) -> None:
    key = request_key(job, 0)
    producer.offer(key)
    wait_for(lambda: consumer.adopted)
    consumer.claims.failed(PullFailed(f"{key}/1", key, "StaleEpoch", "another life"))
    wait_for(lambda: producer.failed == [key])
    wait_for(lambda: producer.unpinned == [f"{key}/1"])
    assert producer.left == []
    assert store.holds.owners([(job, 0)]) == {(job, 0): None}
    assert consumer.room.inside() == []


def test_what_somebody_else_holds_is_not_decoded_twice(
    producer: Producer, consumer: Consumer, store: Store, job: JobId, workers: list[WorkerId]
) -> None:
    store.holds.take(workers[2], [(job, 0)])
    producer.offer(request_key(job, 0))
    wait_for(lambda: producer.left == [request_key(job, 0)])
    assert consumer.adopted == []


def test_an_emptied_registry_is_filled_again_with_what_nobody_has(
    producer: Producer,
    consumer: Consumer,
    registry: MemoryRegistry,
    store: Store,
    job: JobId,
    workers: list[WorkerId],
) -> None:
    consumer.may_claim.clear()
    producer.offer(request_key(job, 0), request_key(job, 1))
    wait_for(lambda: registry.depth() == 2)
    store.holds.take(workers[2], [(job, 0)])  # claimed and pulled, and the release was forgotten
    registry.clear()
    wait_for(lambda: producer.left == [request_key(job, 0)])
    consumer.may_claim.set()
    wait_for(lambda: consumer.adopted == [f"{request_key(job, 1)}/1"])
    consumer.claims.pulled(consumer.adopted)
    wait_for(lambda: len(producer.offers) == 0)
    assert producer.failed == []


def test_a_request_that_is_here_already_is_not_adopted_again(
    producer: Producer, consumer: Consumer, registry: MemoryRegistry, job: JobId
) -> None:
    key = request_key(job, 0)
    producer.offer(key)
    wait_for(lambda: consumer.adopted)
    registry.clear()  # while it is pulled
    producer.offers.take([Handoff(key, f"{key}/2", b"descriptor", 100)])
    wait_for(lambda: f"{key}/2" in producer.unpinned)
    consumer.claims.pulled([f"{key}/1"])
    wait_for(lambda: len(producer.offers) == len(consumer.claims) == 0)
    assert consumer.adopted == [f"{key}/1"] and consumer.room.inside() == [key]


def test_a_fenced_worker_leaves_claims_to_others(
    producer: Producer,
    consumer: Consumer,
    registry: MemoryRegistry,
    store: Store,
    job: JobId,
    workers: list[WorkerId],
) -> None:
    store.workers.retire(workers[1])
    consumer.may_claim.clear()
    producer.offer(request_key(job, 0))
    wait_for(lambda: registry.depth() == 1)
    consumer.may_claim.set()
    wait_for(lambda: registry.depth() == 0 and len(consumer.claims) == 0)
    assert producer.unpinned == [] and consumer.adopted == []


def test_withdrawn_offers_are_gone(
    producer: Producer, consumer: Consumer, registry: MemoryRegistry, job: JobId
) -> None:
    consumer.may_claim.clear()
    producer.offer(request_key(job, 0), request_key(job, 1))
    wait_for(lambda: registry.depth() == 2)
    producer.offers.withdraw([request_key(job, 0)])
    assert registry.depth() == 1
    producer.offers.withdraw()
    assert registry.depth() == len(producer.offers) == 0
