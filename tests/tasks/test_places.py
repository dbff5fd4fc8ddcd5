"""How many shards a worker works on at once: enough that its engine never runs below its batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pdbatch.config import Settings
from pdbatch.local.processes import LEAST_SHARDS
from tasks import lanes
from tasks.worker.engine_config import shards_at_once


@pytest.mark.parametrize(
    ("given", "device", "shards"),
    [
        ({}, "cpu", 8),
        ({}, "cuda:0", 16),
        ({"max_num_seqs": 256}, "cuda:0", 8),
        ({"max_num_seqs": 512, "shard_size": 100}, "cuda:0", 11),
        ({"max_num_seqs": 512, "worker_shards": 3}, "cuda:0", 3),
    ],
)
def test_twice_the_sequences_that_can_run(given: Any, device: str, shards: int) -> None:
    assert shards_at_once(Settings(**given), device) == shards


class Qos:
    """kombu's, as far as it is used."""

    def __init__(self, value: int) -> None:
        self.value = self.told = value

    def update(self) -> None:
        self.told = self.value


@pytest.mark.parametrize(("concurrency", "places"), [(LEAST_SHARDS, 16), (5, 5)])
def test_celery_is_told_unless_it_was_told_a_number(concurrency: int, places: int) -> None:
    consumer = SimpleNamespace(
        initial_prefetch_count=concurrency,
        qos=Qos(concurrency),
        pool=SimpleNamespace(num_shards=16),
    )
    for _ in range(2):  # once more after a lost connection
        lanes._give_places(consumer)
        assert consumer.initial_prefetch_count == consumer.qos.told == places
