"""Stop strings: found across token boundaries, and cut from the output.

One `StopChecker` for each running sequence. It is fed the pieces of text in order and keeps
the output's text; after it has reported a stop, `text` ends right before the stop string.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Collects one output's text and finds the first stop string in it."""

    text: str
    """The output so far; without the stop string once one was found."""

    def __init__(self, stops: Sequence[str] = (), text: str = "") -> None:
        self.text = text
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)

    def push(self, piece: str, *, armed: bool = True) -> str | None:
        """Append a piece of text; the stop string that it completes, or None.

        Of several the one that begins first wins, and of those the longest. With
        `armed=False` (before `min_tokens`) nothing stops, and a stop string that lies
        wholly in such text never will.
        """
        known = len(self.text)
        self.text += piece
        if not piece or not armed:
            return None
        found: tuple[int, int] | None = None
        stopped = None
        for stop in self._stops:
            at = self.text.find(stop, max(0, known - len(stop) + 1))
            if at >= 0 and (found is None or (at, -len(stop)) < found):
                found, stopped = (at, -len(stop)), stop
        if found is not None:
            self.text = self.text[: found[0]]
        return stopped

    @property
    def settled(self) -> int:
        """Characters of `text` that no later piece can turn into part of a stop string."""
        size = len(self.text)
        for held in range(min(self._longest - 1, size), 0, -1):
            tail = self.text[size - held :]
            if any(len(stop) > held and stop.startswith(tail) for stop in self._stops):
                return size - held
        return size
