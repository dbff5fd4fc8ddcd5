"""Which requests of which shard are still here."""

from __future__ import annotations

from pdbatch.engine.messages import EngineRequest
from pdbatch.ids import JobId, RequestKey, ShardIndex
from pdbatch.request import RequestSpec
from tasks.worker.open_shards import OpenShard, OpenShards

JOB = JobId("job_a")


def _shard(index: int, keys: list[str], over: list[int], attempt: int = 0) -> OpenShard:
    left = {RequestKey(k): EngineRequest(key=k, spec=RequestSpec(prompt=k)) for k in keys}
    return OpenShard(
        job=JOB,
        shard=ShardIndex(index),
        attempt=attempt,
        on_over=lambda shard: over.append(shard.shard),
        left=left,
    )


def test_a_shard_is_over_with_its_last_request_and_once() -> None:
    over: list[int] = []
    shards = OpenShards()
    shards.add(_shard(0, ["job_a:0", "job_a:1"], over))
    shards.add(_shard(1, ["job_a:2"], over))
    shards.leave(["job_a:0", "job_b:9"])
    assert over == [] and shards.num_requests == 2
    shards.leave(["job_a:1", "job_a:2", "job_a:1"])
    assert sorted(over) == [0, 1]
    assert len(shards) == 0 and shards.keys() == []


def test_again_counts_and_knows_only_what_is_here() -> None:
    shards = OpenShards()
    shards.add(_shard(0, ["job_a:0"], []))
    first, second = shards.again("job_a:0"), shards.again("job_a:0")
    assert first and second and (first[1], second[1]) == (1, 2)
    shards.leave(["job_a:0"])
    assert shards.again("job_a:0") is None


def test_a_newer_claim_of_a_shard_ends_the_older() -> None:
    over: list[int] = []
    shards = OpenShards()
    shards.add(_shard(0, ["job_a:0", "job_a:1"], over))
    shards.add(_shard(0, ["job_a:1"], over, attempt=1))
    assert over == [0]
    shards.leave(["job_a:0"])
    assert shards.find(JOB, 0) is not None
    shards.leave(["job_a:1"])
    assert over == [0, 0]


def test_clear_forgets_without_telling() -> None:
    over: list[int] = []
    shards = OpenShards()
    shards.add(_shard(3, ["job_a:0"], over))
    assert [shard.shard for shard in shards.clear()] == [3]
    shards.leave(["job_a:0"])
    assert over == [] and shards.jobs() == set()
