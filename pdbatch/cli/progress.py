"""How a job goes on, on stderr: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from pdbatch.cli.display import duration
from pdbatch.cli.rates import Speed, SpeedMeter

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from pdbatch.intake import IngestProgress
    from pdbatch.store import JobView

_LINE_EVERY_S = 5.0


class ProgressDisplay(Protocol):
    """Told what happens, as often as the teller likes."""

    def ingest(self, progress: IngestProgress) -> None:
        """Lines are being taken in."""

    def job(self, view: JobView) -> None:
        """The job stands so."""

    def say(self, text: str) -> None:
        """Something else that is worth a line."""


@contextmanager
def open_progress(stream: TextIO | None = None) -> Iterator[ProgressDisplay]:
    """The display that fits the stream (stderr)."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield LineProgress(stream)
        return
    from rich.console import Console

    bar = _bar(Console(file=stream))
    with bar:
        yield BarProgress(bar)


class LineProgress:
    """A line at the start, at the end, and every 5 s between, where something changed."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._meter = SpeedMeter(clock)
        self._last_line = ""
        self._next_at = float("-inf")

    def ingest(self, progress: IngestProgress) -> None:
        """See ProgressDisplay."""
        rejected = f", {progress.num_rejected:,} rejected" if progress.num_rejected else ""
        self._line(f"{progress.num_rows:,} requests read{rejected}", final=progress.done)

    def job(self, view: JobView) -> None:
        """See ProgressDisplay."""
        counts, speed = view.counts, self._meter.feed(view)
        text = f"{view.state}: {counts.done:,} of {counts.total:,} requests" + _speed_text(speed)
        self._line(text, final=view.finished_at is not None)

    def say(self, text: str) -> None:
        """See ProgressDisplay."""
        print(text, file=self._stream, flush=True)

    def _line(self, text: str, *, final: bool) -> None:
        now = self._clock()
        if text != self._last_line and (final or now >= self._next_at):
            self._last_line, self._next_at = text, now + _LINE_EVERY_S
            self.say(text)


class BarProgress:
    """One bar: first for the lines read, then for the requests done."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._meter = SpeedMeter()
        self._task = bar.add_task("reading", total=None, speed="")

    def ingest(self, progress: IngestProgress) -> None:
        """See ProgressDisplay."""
        speed = f"{progress.num_rejected:,} rejected" if progress.num_rejected else ""
        self._bar.update(self._task, completed=progress.num_rows, speed=speed)

    def job(self, view: JobView) -> None:
        """See ProgressDisplay."""
        speed = _speed_text(self._meter.feed(view)).removeprefix(", ")
        self._bar.update(
            self._task,
            description=str(view.state),
            completed=view.counts.done,
            total=view.counts.total,
            speed=speed,
        )

    def say(self, text: str) -> None:
        """See ProgressDisplay."""
        self._bar.console.print(text, markup=False, highlight=False)


def _speed_text(speed: Speed) -> str:
    if speed.requests_per_s <= 0:
        return ""
    text = f", {speed.requests_per_s:,.1f} prompts/s, {speed.tokens_per_s:,.0f} tokens/s"
    return text + (f", {duration(speed.eta_s)} left" if speed.eta_s else "")


def _bar(console: object) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    assert isinstance(console, Console)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        console=console,
    )
