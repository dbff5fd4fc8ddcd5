"""How much a decode worker may claim."""

from __future__ import annotations

from pdbatch.engine.messages import EngineInfo, Stats
from tasks.worker.room import Room

INFO = EngineInfo(
    model="m",
    role="decode",
    device="cpu",
    dtype="float32",
    max_model_len=100,
    block_size=16,
    num_blocks=100,
    block_bytes=10,
    layout="l",
    transports=[],
    pid=1,
)


def _stats(free: int, *, held: bool = False) -> Stats:
    fields = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**fields | {"free_blocks": free, "total_blocks": 100, "held": held})


def test_an_empty_worker_has_all_its_room() -> None:
    assert Room(INFO, 8).left() == (8, 1000)


def test_what_was_claimed_is_not_claimed_on_again_before_the_engine_counts_it() -> None:
    room = Room(INFO, 8)
    room.claimed("a/1", "a", 205)  # 21 blocks
    assert room.left() == (7, (100 - 21 - 10) * 10)
    room.pulled(["a/1"])
    assert room.left() == (7, (100 - 21 - 10) * 10)
    room.update(_stats(free=75))  # the engine's own word
    assert room.left() == (7, 650)
    room.gone("a")
    assert room.left() == (8, 750)


def test_a_failed_pull_gives_its_room_back() -> None:
    room = Room(INFO, 1)
    room.claimed("a/1", "a", 100)
    assert room.left()[0] == 0
    room.gone("a", "a/1")
    assert room.left() == (1, 1000)


def test_there_is_never_less_than_nothing() -> None:
    room = Room(INFO, 2)
    room.update(_stats(free=3))
    room.claimed("a/1", "a", 500)
    assert room.left() == (1, 0)


def test_an_engine_that_keeps_its_free_blocks_leaves_claims_to_others() -> None:
    room = Room(INFO, 8)
    room.claimed("a/1", "a", 100)
    room.update(_stats(free=80, held=True))
    assert room.left() == (0, 0)
    room.gone("a", "a/1")  # nothing is here: whatever the engine said is over
    assert room.left() == (8, 800)
    room.claimed("b/1", "b", 100)
    room.update(_stats(free=80))
    assert room.left() == (7, 600)
