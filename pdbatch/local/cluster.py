"""A whole cluster on this machine, for the length of one job: what `pdbatch run` starts.

1. `with LocalCluster(settings, models, …)`: a private Redis is started and awaited, the
   embedded database brought up to date, then reconciler and workers are started.
2. `step`, called by the owner's loop, keeps them running. It raises EngineError, with what the
   worker's log says, when no worker of some model and role can start at all.
3. Leaving the block ends the workers in order, Redis last. A cluster that is killed takes
   its processes with it.

Logs: one file for each process in `settings.logs`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from types import TracebackType

from pdbatch.config import Role, Settings
from pdbatch.errors import ConfigError, EngineError
from pdbatch.local.child import ProcessSpec
from pdbatch.local.database import prepare
from pdbatch.local.health import Health
from pdbatch.local.processes import (
    child_env,
    reconciler_argv,
    redis_process,
    threads_each,
    worker_argv,
    worker_env,
)
from pdbatch.local.reason import last_words
from pdbatch.local.redis import socket_url, wait_for_redis
from pdbatch.local.supervisor import Exit, Supervisor


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to be started."""

    name: str
    """Unique in the database, also beside another cluster of this machine."""
    log_name: str
    role: Role
    model: str
    device: str


def plan_workers(
    models: Iterable[str], prefill: int, decode: int, devices: str = "auto", ranks: int = 1
) -> list[WorkerPlan]:
    """The workers for these models: `prefill` and `decode` of each for every model.

    Without decode workers, those of prefill do both (`mixed`). `devices` may name several, with
    commas; the workers take them in turn, `ranks` at a time. Raises ConfigError for a plan that can
    do no work.
    """
    if prefill < 1 or decode < 0:
        raise ConfigError(
            f"{prefill} prefill and {decode} decode workers can do no work",
            remedy="Give --prefill at least 1; --decode 0 makes workers that do both.",
        )
    first: Role = "prefill" if decode else "mixed"
    roles: list[Role] = [first] * prefill + ["decode"] * decode
    turn = cycle(_shares(devices, ranks))
    plans: list[WorkerPlan] = []
    for model_number, model in enumerate(sorted(models), start=1):
        for number, role in enumerate(roles):
            ordinal = roles[: number + 1].count(role)
            suffix = f"-m{model_number}" if model_number > 1 else ""
            log_name = f"{role}-{ordinal}{suffix}"
            name = f"{log_name}-{os.getpid()}"
            plans.append(WorkerPlan(name, log_name, role, model, next(turn)))
    return plans


def _shares(devices: str, ranks: int) -> list[str]:
    """What each worker in turn has of several devices. Raises ConfigError."""
    names = [device.strip() for device in devices.split(",")]
    if len(names) == 1:
        return names
    if len(names) % ranks:
        raise ConfigError(
            f"{len(names)} devices cannot be shared out among workers that need {ranks} each",
            remedy="Name as many for each worker, or the first one alone.",
        )
    return [",".join(names[at : at + ranks]) for at in range(0, len(names), ranks)]


class LocalCluster:
    """See the module. Raises QueueError, StoreError or ConfigError from `__enter__`."""

    def __init__(
        self,
        settings: Settings,
        plans: Sequence[WorkerPlan],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` is told when a worker ends that was not asked to."""
        self._folder = Path(tempfile.mkdtemp(prefix="pdbatch-"))
        self._redis_socket = self._folder / "redis.sock"
        self._plans = {plan.name: plan for plan in plans}
        self._say = say
        self.health = Health(settings.max_attempts)
        self.settings = replace(
            settings,
            broker_url=socket_url(self._redis_socket),
            worker_threads=settings.worker_threads or threads_each(len(plans)),
        )
        self.supervisor = Supervisor([], on_exit=self._note_exit)

    def __enter__(self) -> LocalCluster:
        try:
            prepare(self.settings)
            logs = self.settings.logs
            logs.mkdir(parents=True, exist_ok=True)
            self.supervisor.add(redis_process(self._redis_socket, logs / "redis.log"))
            self.supervisor.start()
            wait_for_redis(self.settings.broker_url or "")
            self.supervisor.add(self._reconciler())
            for plan in self._plans.values():
                self.supervisor.add(self._worker(plan))
            self.supervisor.start()
        except BaseException:
            self.close(0)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(3.0 if kind else 20.0)

    def close(self, deadline_s: float) -> None:
        """Ends all processes; those that are not done at the deadline are killed."""
        self.supervisor.stop(deadline_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def all_registered(self) -> bool:
        """Whether every worker has been seen alive."""
        return self.health.has_registered(self._plans)

    def step(self, timeout_s: float) -> None:
        """Keeps the processes running for up to `timeout_s`; returns early when one ends.

        Raises EngineError when the workers of a model and role are all beyond hope.
        """
        due_s = self.supervisor.step()
        self._raise_if_hopeless()
        self.supervisor.wait(timeout_s if due_s is None else min(timeout_s, due_s))

    def _raise_if_hopeless(self) -> None:
        groups: dict[tuple[str, str], list[WorkerPlan]] = {}
        for plan in self._plans.values():
            groups.setdefault((plan.model, plan.role), []).append(plan)
        for (model, role), plans in groups.items():
            if all(self.health.is_hopeless(plan.name) for plan in plans):
                log = self.settings.logs / f"{plans[0].log_name}.log"
                raise EngineError(
                    f"the {role} worker of {model} cannot run: {self._last_words(plans[0].name)}",
                    remedy=f"Its log is {log}.",
                )

    def _note_exit(self, exit_: Exit) -> None:
        reason = self._last_words(exit_.name)
        self.health.note_exit(exit_, reason)
        self._say(f"{exit_.name} has ended: {reason}; it starts again in {exit_.restart_in_s:g} s")

    def _last_words(self, name: str) -> str:
        return last_words(self.supervisor.log_tail(name)) or "it said nothing"

    def _reconciler(self) -> ProcessSpec:
        return ProcessSpec(
            name="reconciler",
            argv=reconciler_argv(),
            env=child_env(self.settings),
            log=self.settings.logs / "reconciler.log",
        )

    def _worker(self, plan: WorkerPlan) -> ProcessSpec:
        sharing = sum(other.device == plan.device for other in self._plans.values())
        settings = replace(
            self.settings,
            worker_name=plan.name,
            role=plan.role,
            model=plan.model,
            device=plan.device,
            gpu_memory_utilization=self.settings.gpu_memory_utilization / sharing,
        )
        return ProcessSpec(
            name=plan.name,
            argv=worker_argv(settings),
            env=worker_env(settings),
            log=self.settings.logs / f"{plan.log_name}.log",
        )
