"""What a step has to tell, collected until the step ends, and the counts since the start."""

from __future__ import annotations

from pdbatch.engine.messages import Event, Finished, Handoff, Prefilled, Pulled, PullFailed
from pdbatch.request import RequestOutput


class Outbox:
    """Events of one step, as few frames as possible; `take` empties it."""

    def __init__(self) -> None:
        self.finished: list[RequestOutput] = []
        self.prefilled: list[Handoff] = []
        self.pulled: list[str] = []
        self.other: list[Event] = []
        """Sent after the others."""
        self.prompt_tokens = 0
        """Cumulative, as all below; see `pdbatch.engine.messages.Stats`."""
        self.cached_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.steps = 0
        self.pulled_bytes = 0

    @property
    def pending(self) -> bool:
        """Whether there is something to tell."""
        return bool(self.finished or self.prefilled or self.pulled or self.other)

    def pull_failed(self, handoff_id: str, key: str, code: str, message: str) -> None:
        """One adoption will not be decoded here."""
        self.other.append(PullFailed(handoff_id, key, code, message))

    def drop(self, key: str) -> None:
        """No result of this request is told."""
        if self.finished:
            self.finished = [output for output in self.finished if output.key != key]

    def take(self) -> list[Event]:
        """All events, Pulled before the results of what was pulled."""
        events: list[Event] = []
        if self.pulled:
            events.append(Pulled(self.pulled))
        if self.prefilled:
            events.append(Prefilled(self.prefilled))
        if self.finished:
            events.append(Finished(self.finished))
        events += self.other
        self.clear()
        return events

    def clear(self) -> None:
        """Forget the events; the counts stay."""
        self.finished, self.prefilled, self.pulled, self.other = [], [], [], []
