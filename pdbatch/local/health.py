"""Whether a worker that keeps ending will ever do any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pdbatch.local.supervisor import Exit

LONG_LIFE_S = 30.0
EXITS_BEFORE_REGISTERED = 3
"""So many short lives in a row, none of which got as far as the workers' table."""


HOPELESS_REASONS = ("ModelError: ", "ConfigError: ", "UsageError: ")
"""What another start does not change."""


class Health:
    """Counts short lives. One that registered is given more of them than a request that ends
    its engine may take (`max_attempts`), as long as no row is written between."""

    def __init__(self, max_attempts: int) -> None:
        self._most_exits = max_attempts + 2
        self._exits: Counter[str] = Counter()
        self._registered: set[str] = set()
        self._num_done = 0

    def note_exit(self, exit_: Exit, reason: str = "") -> None:
        """A worker ended, with these last words."""
        if exit_.lived_s >= LONG_LIFE_S:
            self._exits[exit_.name] = 0
        self._exits[exit_.name] += 1
        if any(words in reason for words in HOPELESS_REASONS):
            self._exits[exit_.name] += EXITS_BEFORE_REGISTERED

    def note_registered(self, names: Iterable[str]) -> None:
        """The database has seen these alive: they can start."""
        self._registered.update(names)

    def note_done(self, num_done: int) -> None:
        """So many requests have their rows; more than before is a sign of health."""
        if num_done > self._num_done:
            self._num_done = num_done
            for name in self._registered:
                self._exits[name] = 0

    def has_registered(self, names: Iterable[str]) -> bool:
        """Whether all of these have been seen alive."""
        return self._registered.issuperset(names)

    def is_hopeless(self, name: str) -> bool:
        """Whether to give this worker up."""
        limit = self._most_exits if name in self._registered else EXITS_BEFORE_REGISTERED
        return self._exits[name] >= limit
