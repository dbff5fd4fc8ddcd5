"""A whole pdbatch for tests: real Celery workers with the null engine, a real reconciler.

Nothing is restarted by itself: a test that ends a process starts it again when it wants to.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from sqlalchemy import make_url

from pdbatch.config import Role, Settings
from pdbatch.formats import encode_spec
from pdbatch.ids import JobId
from pdbatch.local.processes import (
    child_env,
    flower_argv,
    reconciler_argv,
    worker_argv,
    worker_env,
)
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams
from pdbatch.states import TERMINAL_JOB_STATES, JobState
from pdbatch.store import IngestRow, JobView, NewJob, Store

DEADLINE_S = 60.0


@dataclass
class Cluster:
    """Processes by name: `reconciler`, or `<role>-<number>` for a worker."""

    settings: Settings
    store: Store
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, *names: str, settings: Settings | None = None) -> None:
        """Start these, and wait until workers are in the database's table."""
        base = settings or self.settings
        known = {worker.id for worker in self.store.workers.list(live_only=False)}
        for name in names:
            argv, env = self._command(name, base)
            with self._log(name).open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    argv, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0
                )
        workers = {name for name in names if "-" in name}

        def begun() -> bool:
            fresh = {w.name for w in self.store.workers.list() if w.id not in known}
            return workers <= fresh & self.live()

        self.wait(f"{sorted(workers)}", begun)

    def _command(self, name: str, base: Settings) -> tuple[Sequence[str], dict[str, str]]:
        if name == "reconciler":
            return reconciler_argv(), child_env(base)
        if name == "flower":
            return flower_argv(), child_env(base) | {"FLOWER_UNAUTHENTICATED_API": "true"}
        role: Role = {"prefill": "prefill", "decode": "decode", "mixed": "mixed"}[
            name.split("-")[0]
        ]  # type: ignore[assignment]
        mine = replace(base, role=role, worker_name=name)
        return worker_argv(mine), worker_env(mine)

    def _log(self, name: str) -> Path:
        return self.settings.home / f"{name}.log"

    def live(self) -> set[str]:
        """Names of the workers that the database believes alive and whose process runs."""
        live = {worker.name for worker in self.store.workers.list()}
        return {n for n in live if n in self.processes and self.processes[n].poll() is None}

    def family(self, name: str) -> list[psutil.Process]:
        """The process, then its children (a worker's engine)."""
        process = psutil.Process(self.processes[name].pid)
        return [process, *process.children(recursive=True)]

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal to the process and its children."""
        for process in self.family(name):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def pause(self, name: str) -> None:
        """Stop the process and its children, outside of any transaction: amid one it would hold
        SQLite's lock for as long as it stands still, and nobody could declare it dead."""
        self.send(name, signal.SIGSTOP)
        while not self._writable():
            self.send(name, signal.SIGCONT)
            self.send(name, signal.SIGSTOP)

    def _writable(self, limit_s: float = 3.0) -> bool:
        """Whether others may write to the database."""
        path = make_url(self.settings.database_url).database
        if self.store.writes_side_by_side or path is None:
            return True
        with closing(sqlite3.connect(path, timeout=limit_s, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            connection.execute("ROLLBACK")
        return True

    def kill(self, name: str) -> None:
        """SIGKILL to the main process alone; its engine must follow by itself."""
        children = self.family(name)[1:]
        self.processes[name].kill()
        self.processes[name].wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"the engine of {name} outlived it"

    def restart_ended(self) -> None:
        """What ended is started again, as the supervisor would."""
        self.start(
            *(name for name, process in self.processes.items() if process.poll() is not None)
        )

    def stop(self, name: str, deadline_s: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.processes[name].terminate()
        return self.processes[name].wait(deadline_s)

    def wait(
        self, what: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S
    ) -> None:
        """Look until `condition` holds. Raises TimeoutError with the ends of all logs."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {deadline_s} s\n{self.tails()}")
            time.sleep(0.02)

    def submit(self, num_requests: int, *, shard_size: int = 16, least_tokens: int = 1) -> JobId:
        """A job of requests for so many tokens and up to two more each."""
        job = self.store.jobs.create(NewJob(input_name="test"))
        with self.store.ingest(job, shard_size=shard_size, default_model="m") as ingest:
            for index in range(num_requests):
                sampling = SamplingParams(max_tokens=least_tokens + index % 3, temperature=0)
                body = encode_spec(RequestSpec(prompt=f"prompt {index}", sampling=sampling))
                ingest.add(IngestRow(index, f"r{index}", None, body))
        return job

    def done(self, job: JobId) -> int:
        """Requests that have their row."""
        return self.store.jobs.get(job).counts.done

    def finish(self, job: JobId, deadline_s: float = DEADLINE_S) -> JobView:
        """Wait for the job's end; each request must have succeeded, once."""

        def ended() -> bool:
            return self.store.jobs.states([job])[job] in TERMINAL_JOB_STATES

        self.wait(f"end of {job}", ended, deadline_s)
        view = self.store.jobs.get(job)
        assert view.state is JobState.COMPLETED
        assert view.counts.succeeded == view.counts.total
        indexes = [row.index for row in self.store.results.iterate(job)]
        assert indexes == list(range(view.counts.total))
        return view

    def assert_idle(self) -> None:
        """No worker holds a block or a request once all is done."""

        def busy() -> dict[str, dict[str, object]]:
            keys = ("used_blocks", "pinned_requests", "running", "waiting", "pulling", "claimed")
            found = {}
            for worker in self.store.workers.list():
                if worker.name in self.live():
                    held = {k: worker.stats[k] for k in keys if worker.stats.get(k)}
                    held |= {"holds": worker.num_holds} if worker.num_holds else {}
                    held |= {"shards": worker.num_shards} if worker.num_shards else {}
                    if held or "used_blocks" not in worker.stats:
                        found[worker.name] = held
            return found

        self.wait("idle workers", lambda: not busy(), 20.0)

    def tails(self, lines: int = 40) -> str:
        """The ends of all logs."""
        parts = [f"jobs {self.store.jobs.list()}", f"workers {self.store.workers.list()}"]
        for path in sorted(self.settings.home.glob("*.log")):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(end))
        return "\n".join(parts)

    def close(self) -> None:
        """End everything that still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
