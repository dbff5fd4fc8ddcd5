"""A whole pdbatch for a benchmark, under the real supervisor, with a look inside.

Everything is called from one thread, which must `pump` while it waits: that keeps what was killed
coming back, as `pdbatch up` would.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import psutil

from pdbatch.config import Role, Settings
from pdbatch.local.child import ProcessSpec
from pdbatch.local.processes import (
    child_env,
    reconciler_argv,
    redis_process,
    worker_argv,
    worker_env,
)
from pdbatch.local.redis import socket_url, wait_for_redis
from pdbatch.local.supervisor import Exit, Supervisor
from pdbatch.store import Store
from pdbatch.store.schema import upgrade


@dataclass(slots=True)
class Fleet:
    """Redis, a reconciler and workers; `with` starts them and ends them."""

    settings: Settings
    roles: Sequence[Role]
    """One worker each, named `prefill-1`, `decode-1`, …"""
    devices: Sequence[str] = ()
    """The workers' devices, in turn; none: as the settings say."""
    exits: list[Exit] = field(default_factory=list)
    """What ended since the start, and when it comes back."""
    supervisor: Supervisor = field(init=False)

    def __post_init__(self) -> None:
        home = self.settings.home
        (home / "logs").mkdir(parents=True, exist_ok=True)
        self.settings = replace(self.settings, broker_url=socket_url(home / "redis.sock"))
        self.supervisor = Supervisor([], on_exit=self.exits.append)

    def __enter__(self) -> Fleet:
        home = self.settings.home
        upgrade(self.settings.database_url)
        self.supervisor.add(redis_process(home / "redis.sock", home / "logs" / "redis.log"))
        self.supervisor.start()
        wait_for_redis(self.settings.broker_url or "")
        self._add("reconciler", reconciler_argv(), child_env(self.settings))
        for number, role in enumerate(self.roles):
            name = f"{role}-{self.roles[: number + 1].count(role)}"
            device = self.devices[number % len(self.devices)] if self.devices else None
            mine = replace(
                self.settings, role=role, worker_name=name, device=device or self.settings.device
            )
            self._add(name, worker_argv(mine), worker_env(mine))
        self.supervisor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in self.names():  # what is stopped cannot end in order
            self.send(name, signal.SIGCONT)
        self.supervisor.stop(5.0 if kind else 20.0)

    def _add(self, name: str, argv: Sequence[str], env: dict[str, str]) -> None:
        log = self.settings.home / "logs" / f"{name}.log"
        self.supervisor.add(ProcessSpec(name=name, argv=tuple(argv), env=env, log=log))

    def names(self) -> list[str]:
        """All processes by the name of their place."""
        return self.supervisor.names()

    def family(self, name: str) -> list[psutil.Process]:
        """The process in that place, then its children (a worker's engine); empty while down."""
        pid = self.supervisor.pid(name)
        if pid is None:
            return []
        try:
            process = psutil.Process(pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def send(self, name: str, signum: int) -> bool:
        """Send a signal to the place's process and its children. False while it is down."""
        family = self.family(name)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)
        return bool(family)

    def pump(self, timeout_s: float = 0.05) -> None:
        """Let the supervisor work, for at most so long."""
        due_s = self.supervisor.step()
        self.supervisor.wait(timeout_s if due_s is None else min(timeout_s, due_s))

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Pump until `condition` holds. Raises TimeoutError with the ends of all logs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {timeout_s} s\n{self.tails()}")
            self.pump()

    def wait_ready(self, store: Store, timeout_s: float = 120.0) -> None:
        """Until every worker is in the database's table, alive."""
        wanted = {name for name in self.names() if name.split("-")[0] in set(self.roles)}
        self.wait_for(
            f"{sorted(wanted)}",
            lambda: wanted <= {worker.name for worker in store.workers.list()},
            timeout_s,
        )

    def tails(self, lines: int = 15) -> str:
        """The last lines of every log."""
        parts = []
        for path in sorted((self.settings.home / "logs").glob("*.log")):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(end))
        return "\n".join(parts)


@dataclass(slots=True)
class Usage:
    """CPU seconds and the highest resident size of each process of a fleet, sampled."""

    fleet: Fleet
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    _start: dict[int, float] = field(default_factory=dict)

    def sample(self) -> None:
        """Look once; cheap enough for twice a second."""
        for name in self.fleet.names():
            for number, process in enumerate(self.fleet.family(name)):
                label = name if number == 0 else f"{name}/engine"
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    now_s = times.user + times.system
                    first = self._start.setdefault(process.pid, now_s)
                    self.cpu_s[label] = now_s - first
                    size = process.memory_info().rss
                    self.peak_bytes[label] = max(self.peak_bytes.get(label, 0), size)


def pin_to(cores: int) -> list[int]:
    """Keep this process and all that it starts on so many cores; returns them."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, chosen)
    return chosen


def fresh_home(path: Path | None) -> Path:
    """The folder given, or a new temporary one that is left for a look afterwards."""
    import tempfile

    home = path or Path(tempfile.mkdtemp(prefix="pdbatch-bench-"))
    home.mkdir(parents=True, exist_ok=True)
    return home
