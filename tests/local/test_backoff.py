"""The waits between two lives of a process."""

from __future__ import annotations

from pdbatch.local.backoff import Backoff


def test_it_doubles_to_its_most() -> None:
    backoff = Backoff()
    assert [backoff.after(0.1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_long_life_makes_it_forget() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after(1)
    assert backoff.num_exits == 5
    assert backoff.after(30) == 0.5
    assert backoff.num_exits == 1
    assert backoff.after(29.9) == 1


def test_it_does_not_overflow() -> None:
    backoff = Backoff(num_exits=10_000)
    assert backoff.after(0) == 30
