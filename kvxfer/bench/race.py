"""Turns and their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Turn = Callable[[int], float]
"""Moves the bytes of one turn, given its number; returns the seconds that it took."""
Times = Mapping[str, Sequence[float]]


def timed(work: Callable[[int], object]) -> Turn:
    """Its seconds by our clock."""

    def turn(number: int) -> float:
        start = time.perf_counter()
        work(number)
        return time.perf_counter() - start

    return turn


def race(entrants: Mapping[str, Turn], rounds: int, tables: int) -> dict[str, list[float]]:
    """Seconds of each in each round. Before that each goes through all tables once, which opens
    connections and mappings and does not count; each round begins with another entrant."""
    for turn in entrants.values():
        for number in range(tables):
            turn(number)
    names = list(entrants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(entrants[name](number))
    return times


def share(times: Sequence[float], of: Sequence[float]) -> float:
    """How fast `times` are beside `of`: the median over the rounds; 1 is as fast."""
    return statistics.median(b / a for a, b in zip(times, of, strict=True))
