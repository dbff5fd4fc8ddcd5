"""A trace of an engine for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

The format is Chrome's JSON array of events: `X` spans, `C` counters, `M` names; `ts` and `dur` are
microseconds. Times count from the Unix epoch, so that traces of several workers, opened together,
lie on one line of time. Events are written as they come, about every second, and the format allows
the closing bracket to be missing: the trace of a worker that was killed can be read too.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdbatch.engine.probe import watch

FLUSH_EVERY_S = 1.0


class Tracer:
    """Writes one file; a `probe.Watcher`. `stage` and `batch` are one thread's, `pull` anybody's.

    Raises OSError if the file cannot be made.
    """

    def __init__(self, path: Path, process: str) -> None:
        """`process` is the name that stands above this process's rows."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._epoch_s = time.time() - time.perf_counter()
        self._pid = os.getpid()
        self._threads: dict[int, int] = {}
        self._lock = threading.Lock()
        self._lines: deque[str] = deque()
        self._flush_at_s = 0.0
        self.event({"name": "process_name", "ph": "M", "args": {"name": process}})

    def stage(self, name: str, start_s: float, end_s: float, own_s: float) -> None:
        """A span of the engine's thread."""
        self.span(name, start_s, end_s)
        if end_s > self._flush_at_s:
            self.flush()
            self._flush_at_s = end_s + FLUSH_EVERY_S

    def batch(self, plan: Any, engine: Any) -> None:
        """Counters of one step."""
        now_s = time.perf_counter()
        decodes = len(plan.decodes)
        rows = {"decodes": decodes, "prompts": len(plan.prefills)}
        self.counter("sequences in the step", now_s, rows)
        tokens = {"decode": decodes, "prompt": plan.num_tokens - decodes}
        self.counter("tokens in the step", now_s, tokens)
        self.counter("waiting", now_s, {"sequences": engine.scheduler.num_waiting})
        self.counter("blocks", now_s, {"used": engine.scheduler.blocks.pool.num_used})

    def pull(self, start_s: float, end_s: float, result: Any) -> None:
        """A span of the thread that pulls."""
        self.span("pull", start_s, end_s, {"id": result.handoff_id, "bytes": result.num_bytes})

    def span(
        self, name: str, start_s: float, end_s: float, args: dict[str, Any] | None = None
    ) -> None:
        """Something of the calling thread, seconds on `time.perf_counter`."""
        self.event(
            {
                "name": name,
                "ph": "X",
                "ts": self._ts(start_s),
                "dur": round((end_s - start_s) * 1e6, 1),
                "tid": self._thread(),
                **({"args": args} if args else {}),
            }
        )

    def counter(self, name: str, at_s: float, values: Mapping[str, float]) -> None:
        """Numbers that are drawn above each other."""
        self.event({"name": name, "ph": "C", "ts": self._ts(at_s), "args": values})

    def event(self, event: dict[str, Any]) -> None:
        """Any event of the format; this process's unless it names another."""
        self._lines.append(json.dumps({"pid": self._pid, **event}))

    def flush(self) -> None:
        """Write what has come."""
        with self._lock:
            if not self._file.closed:
                for _ in range(len(self._lines)):
                    self._file.write(self._lines.popleft() + ",\n")
                self._file.flush()

    def close(self) -> None:
        """Write the rest and the end. Events that come later are dropped. Idempotent."""
        if self._file.closed:
            return
        self.flush()
        last = {"name": "trace ends", "ph": "i", "s": "p", "ts": self._ts(time.perf_counter())}
        with self._lock:
            self._file.write(json.dumps({"pid": self._pid, "tid": 1, **last}) + "\n]\n")
            self._file.close()

    def _ts(self, at_s: float) -> float:
        return round((self._epoch_s + at_s) * 1e6, 1)

    def _thread(self) -> int:
        """A small number for the calling thread; its name is an event of its own."""
        ident = threading.get_ident()
        if ident not in self._threads:
            with self._lock:
                tid = self._threads[ident] = len(self._threads) + 1
            name = threading.current_thread().name
            named = "engine" if name == "MainThread" else name
            self.event({"name": "thread_name", "ph": "M", "tid": tid, "args": {"name": named}})
        return self._threads[ident]


def trace_engine(engine: Any, folder: str, worker: str) -> Tracer:
    """Trace a worker's engine into `<folder>/<worker>-<pid>.json`; close it in the end."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in worker)
    tracer = Tracer(Path(folder) / f"{name}-{os.getpid()}.json", worker)
    watch(engine, tracer)
    return tracer
