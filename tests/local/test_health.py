"""When a worker that keeps ending is given up."""

from __future__ import annotations

from pdbatch.local.health import Health
from pdbatch.local.supervisor import Exit


def exits(health: Health, number: int, lived_s: float = 1.0) -> bool:
    for _ in range(number):
        health.note_exit(Exit("w", 1, lived_s, 0.5))
    return health.is_hopeless("w")


def test_one_that_never_registered_has_three_lives() -> None:
    health = Health(max_attempts=10)
    assert not exits(health, 2)
    assert exits(health, 1)
    assert not health.is_hopeless("another")


def test_one_that_registered_outlives_a_request_that_ends_engines() -> None:
    health = Health(max_attempts=10)
    health.note_registered(["w"])
    assert health.has_registered(["w"]) and not health.has_registered(["w", "v"])
    assert not exits(health, 11)
    assert exits(health, 1)


def test_a_new_row_and_a_long_life_make_all_well() -> None:
    health = Health(max_attempts=1)
    health.note_registered(["w"])
    health.note_done(5)
    assert not exits(health, 2)
    health.note_done(6)
    assert not exits(health, 2)
    health.note_done(6)
    assert exits(health, 1)
    assert not exits(health, 1, lived_s=31)


def test_a_wrong_model_needs_no_second_try() -> None:
    health = Health(max_attempts=10)
    health.note_exit(Exit("w", 1, 9.0, 0.5), "EngineError: ModelError: there is no model 'x'")
    assert health.is_hopeless("w")
