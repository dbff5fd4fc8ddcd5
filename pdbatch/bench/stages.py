"""Where the host's time went in a round: seconds by stage, a `probe.Watcher`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


class Stages:
    """Sums since `clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """By stage, without the stages within it; `step` is what is left of the steps."""
        self.num_steps = 0
        """Steps that computed something."""

    def clear(self) -> None:
        """Begin again."""
        self.seconds.clear()
        self.num_steps = 0

    def stage(self, name: str, start_s: float, end_s: float, own_s: float) -> None:
        """See `probe.Watcher`."""
        self.seconds[name] += own_s

    def batch(self, plan: Any, engine: Any) -> None:
        """See `probe.Watcher`."""
        self.num_steps += bool(plan.num_tokens)

    def pull(self, start_s: float, end_s: float, result: Any) -> None:
        """See `probe.Watcher`; nothing is pulled where nothing is handed over."""
