"""Keeps processes running, and ends them in order.

1. `start` starts the processes in the order of their specs.
2. `step`, called by the owner's loop, notes exits and starts again what is due; `wait` sleeps
   until a process ends or the next start is due. `run` is that loop, until `stop_requested`.
3. A process that ends is started again after 0.5 s, 1 s, 2 s … 30 s; after a life of 30 s
   the count begins anew (`Backoff`).
4. `stop`: SIGTERM to all but those that stop last, and SIGKILL to the groups of those that
   are still there at the deadline; then the same for those that stop last.

No thread of its own: call everything from the thread that called `start`, because the
kernel ends the processes together with that thread.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pdbatch.local.backoff import Backoff
from pdbatch.local.child import Child, OnLine, ProcessSpec

CANNOT_RUN = 127
"""The exit code of a program that could not be started, as in a shell."""


@dataclass(frozen=True, slots=True)
class Exit:
    """A process ended, and was not asked to."""

    name: str
    code: int
    """Negative: minus the signal."""
    lived_s: float
    restart_in_s: float


@dataclass(slots=True)
class _Place:
    """A process's place: who is in it, since when, or when the next one starts."""

    child: Child
    backoff: Backoff = field(default_factory=Backoff)
    started_at: float = 0.0
    start_at: float | None = None


def _ignore_line(name: str, line: str) -> None:
    """The output of processes is dropped unless the owner takes it."""


def _ignore_exit(exit_: Exit) -> None:
    """Exits are nobody's business unless the owner takes them."""


class Supervisor:
    """See the module. `clock` counts seconds; tests bring their own."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        on_line: OnLine = _ignore_line,
        on_exit: Callable[[Exit], None] = _ignore_exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._on_exit = on_exit
        self._on_line = on_line
        self._events: queue.SimpleQueue[None] = queue.SimpleQueue()  # put() is safe in a handler
        self._places: dict[str, _Place] = {}
        self.stop_requested = False
        for spec in specs:
            self.add(spec)

    def add(self, spec: ProcessSpec) -> None:
        """One more process, to be started by `start` or by the next `step`."""
        assert spec.name not in self._places, f"two processes are called {spec.name}"
        child = Child(spec, self._wake, self._on_line)
        self._places[spec.name] = _Place(child, start_at=self._clock())

    def start(self) -> None:
        """Starts all that do not run yet, in order."""
        for place in self._places.values():
            if place.start_at is not None:
                self._start(place)

    def step(self) -> float | None:
        """Notes exits, starts what is due; returns the seconds until the next start, if any."""
        while not self._events.empty():
            self._events.get()
        now = self._clock()
        for place in self._places.values():
            code = place.child.poll()
            if code is not None:
                self._note_exit(place, code)
            elif place.start_at is not None and place.start_at <= now:
                self._start(place)
        due = [place.start_at for place in self._places.values() if place.start_at is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleeps until a process ends, `request_stop` is called or the time is over."""
        with suppress(queue.Empty):
            self._events.get(timeout=timeout_s)

    def run(self) -> None:
        """Keeps everything running until `request_stop`."""
        self.start()
        while not self.stop_requested:
            self.wait(self.step())

    def request_stop(self) -> None:
        """Makes `run` return; safe in a signal handler and from any thread."""
        self.stop_requested = True
        self._wake()

    def stop(self, deadline_s: float = 20.0) -> list[str]:
        """Ends everything; returns the names of those that had to be killed."""
        self.stop_requested = True
        killed: list[str] = []
        for last in (False, True):
            group = [p for p in self._places.values() if p.child.spec.stops_last is last]
            for place in group:
                place.start_at = None
                place.child.terminate()
            killed += self._await_end(group, self._clock() + deadline_s)
        return killed

    def names(self) -> list[str]:
        """The names of all processes, in order."""
        return list(self._places)

    def pid(self, name: str) -> int | None:
        """The id of the process of that name, or None while it is down."""
        return self._places[name].child.pid

    def num_exits(self, name: str) -> int:
        """How often in a row it ended after a short life."""
        return self._places[name].backoff.num_exits

    def log_tail(self, name: str) -> str:
        """The end of what its latest life wrote to its log."""
        return self._places[name].child.log_tail()

    def _wake(self) -> None:
        self._events.put(None)

    def _start(self, place: _Place) -> None:
        place.started_at = self._clock()
        place.start_at = None
        try:
            place.child.start()
        except OSError as error:
            self._on_line(place.child.spec.name, f"cannot be started: {error}")
            self._note_exit(place, CANNOT_RUN)

    def _note_exit(self, place: _Place, code: int) -> None:
        lived_s = self._clock() - place.started_at
        restart_in_s = place.backoff.after(lived_s)
        place.start_at = self._clock() + restart_in_s
        self._on_exit(Exit(place.child.spec.name, code, lived_s, restart_in_s))

    def _await_end(self, group: Iterable[_Place], deadline: float) -> list[str]:
        left = [place for place in group if place.child.pid is not None]
        killed: list[str] = []
        while left := [place for place in left if place.child.poll() is None]:
            remaining_s = deadline - self._clock()
            if remaining_s <= 0 and not killed:
                killed = [place.child.spec.name for place in left]
                for place in left:
                    place.child.kill()
            self.wait(max(0.05, min(remaining_s, 1.0)))
        return killed
