"""How long to wait before a process that ended is started again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Doubles from `first_s` to `most_s`; a life of `reset_after_s` makes it forget."""

    first_s: float = 0.5
    most_s: float = 30.0
    reset_after_s: float = 30.0
    num_exits: int = 0
    """Exits in a row, each after a short life."""

    def after(self, lived_s: float) -> float:
        """Seconds to wait after a life of `lived_s`."""
        if lived_s >= self.reset_after_s:
            self.num_exits = 0
        delay_s = min(self.first_s * 2.0 ** min(self.num_exits, 30), self.most_s)
        self.num_exits += 1
        return delay_s
