"""The main process of a worker, without Celery.

1. `start`: the engine's process is started; it loads the model and says `Ready`. Not before that
   is the worker registered, and its loops begin.
2. Prefill and mixed: `submit_shard` gives a shard to `Intake`, which claims it and gives its
   requests to the engine. Decode: `Claims` takes hand-offs from the registry.
3. Events of the engine: finished requests go to the writer, prefilled ones to `Offers`.
4. A shard is over when its last request left; whoever submitted it is told then.
5. Fenced (`Life`): everything is dropped, a new life begins.
6. The engine's end is the worker's: what it answered for is given back as lost, and the
   process exits with `EXIT_ENGINE_DIED`; the supervisor starts a fresh one.
7. `drain`: nothing new; what runs may end within the deadline; the rest is given back.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from pdbatch.config import Settings
from pdbatch.engine import messages as msg
from pdbatch.engine.handoff import Registry, open_registry
from pdbatch.errors import EngineDied, StoreError
from pdbatch.ids import JobId, split_key
from pdbatch.local.processes import worker_name
from pdbatch.queues import connect
from pdbatch.request import RequestError, RequestOutput
from pdbatch.states import TERMINAL_JOB_STATES, JobState
from pdbatch.store import Store
from tasks.worker.claims import Claims
from tasks.worker.engine_config import engine_config, max_seqs
from tasks.worker.engine_link import EngineLink
from tasks.worker.intake import Intake, Over
from tasks.worker.life import Life
from tasks.worker.loop import Loop
from tasks.worker.offers import Offers
from tasks.worker.open_shards import OpenShard, OpenShards
from tasks.worker.room import Room
from tasks.worker.writer import ResultWriter

logger = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 70
CLAIM_AHEAD = 1.5
"""Hand-offs claimed for each sequence that can run: the next ones come while these run."""
WATCH_EVERY_S = 2.0


class WorkerCore:
    """See the module. Raises from `start` what kept the engine from starting."""

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        self.settings = settings
        self.name = worker_name(settings)
        self.host = socket.gethostname()
        self.store = store or Store.open(settings.database_url, max_attempts=settings.max_attempts)
        self.shards = OpenShards()
        self.stats: msg.Stats | None = None
        self.offers: Offers | None = None
        self.claims: Claims | None = None
        self.intake: Intake | None = None
        self._draining = False
        self._dying = threading.Lock()
        self._drained = threading.Event()

    # --- start

    def start(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Start the engine and wait until it is ready; then take part.

        `while_waiting` is called twice a second until then; what it raises ends the start."""
        config = engine_config(self.settings, worker=self.name, host=self.host)
        self.engine = EngineLink(config, while_waiting)
        self.info = self.engine.info
        self.writer = ResultWriter(
            self.store,
            lambda: self.life.id,
            self._on_written,
            self.die,
            group_size=self.settings.result_group_size,
            group_ms=self.settings.result_group_ms,
            more_will_come=self._is_at_work,
        )
        self.life = Life(
            self.store,
            self.settings,
            self.info,
            name=self.name,
            host=self.host,
            stats=self.figures,
            on_fenced=self._on_fenced,
            on_bug=self.die,
        )
        self.engine.send(msg.Reset(self.life.epoch))
        self._open_ways()
        self._loop = Loop("watch", self._watch, self.die)
        self._loop.start()
        self.engine.listen(self._on_event, self.die)
        self.life.begin()
        logger.info(
            "%s serves %s as %s on %s",
            self.life.id,
            self.info.model,
            self.info.role,
            self.info.device,
        )

    def _open_ways(self) -> None:
        """In: shards, or hand-offs. Out, beside rows: hand-offs of a prefill worker."""
        if self.settings.role != "decode":
            self.intake = Intake(
                self.store,
                self.life,
                self.shards,
                hands_off=self.settings.role == "prefill",
                may_claim=lambda: not self.writer.is_full,
                submit=self.engine.send,
                write=self.writer.put,
                on_bug=self.die,
            )
        if self.settings.role == "mixed":
            return
        assert self.settings.broker_url, "a worker has a broker"
        registry: Registry = open_registry(
            connect(self.settings.broker_url), self.settings.model, self.info.layout
        )
        if self.settings.role == "prefill":
            self.offers = Offers(
                registry,
                self.store,
                worker=lambda: self.life.id,
                host=self.host,
                lease_s=self.settings.kv_lease_s,
                unpin=lambda ids: self.engine.send(msg.Unpin(ids)),
                on_left=self.shards.leave,
                on_failed=self._run_again,
                on_bug=self.die,
            )
            return
        places = int(CLAIM_AHEAD * max_seqs(self.settings, self.info.device))
        self.room = Room(self.info, places)
        self.claims = Claims(
            registry,
            self.store,
            self.room,
            worker=lambda: self.life.id,
            taking=self.life.taking,
            host=self.host,
            lease_s=self.settings.claim_lease_s,
            claim_bytes=self.settings.claim_bytes,
            may_claim=lambda: not (self._draining or self.writer.is_full),
            adopt=self.engine.send,
            on_bug=self.die,
        )

    # --- work in

    def submit_shard(self, job: str, shard: int, attempt: int, on_over: Over) -> None:
        """See `Intake.submit`; a decode worker is asked for none."""
        if self.intake is None:
            on_over()
        else:
            self.intake.submit(job, shard, attempt, on_over)

    def cancel_shard(self, job: str, shard: int) -> None:
        """Rows `batch_cancelled` for what has none; its requests are dropped here."""
        self.store.shards.cancel(JobId(job), shard)
        if found := self.shards.find(job, shard):
            self._drop(found)

    # --- events of the engine

    def _on_event(self, event: msg.Event) -> None:
        match event:
            case msg.Finished(outputs):
                self.writer.put(outputs)
                if self.claims is not None:
                    for output in outputs:
                        self.room.gone(output.key)
                    self.claims.wake()
            case msg.Prefilled(handoffs):
                assert self.offers is not None, "only a prefill engine hands off"
                self.offers.take(handoffs)
            case msg.Pulled(handoff_ids):
                assert self.claims is not None
                self.claims.pulled(handoff_ids)
            case msg.PullFailed():
                assert self.claims is not None
                self.claims.failed(event)
            case msg.Stats():
                self.stats = event
                if self.claims is not None:
                    self.room.update(event)
                    self.claims.wake()
            case msg.Drained():
                self._drained.set()
            case msg.Fatal(error, message):
                raise EngineDied(f"{error}: {message}")
            case msg.Ready():
                pass

    def _on_written(self, keys: list[str]) -> None:
        self.shards.leave(keys)

    def _run_again(self, key: str, reason: str) -> None:
        found = self.shards.again(key)
        if found is None:
            return
        request, failures = found
        if failures < self.settings.max_attempts:
            logger.info("%s is prefilled again: %s", key, reason)
            self.engine.send(msg.Submit([request]))
            return
        text = f"Its KV could not be handed over {failures} times; last: {reason}."
        error = RequestError(code="batch_failed", message=text)
        self.writer.put([RequestOutput(key=key, error=error)])

    def _is_at_work(self) -> bool:
        """Whether some request is here that is not on its way into a row."""
        if self.claims is not None:
            return not self.room.is_empty
        return self.shards.num_requests > self.writer.num_waiting

    # --- signs of life, ends

    def figures(self) -> dict[str, Any]:
        """What this worker does now, for the database, Flower and people."""
        found: dict[str, Any] = {}
        if self.stats is not None:
            found |= {f: getattr(self.stats, f) for f in self.stats.__struct_fields__}
        found |= {"open_shards": len(self.shards), "rows_waiting": self.writer.num_waiting}
        if self.offers is not None:
            found["offered"] = len(self.offers)
        if self.claims is not None:
            found["claimed"] = len(self.claims)
        return found

    def _watch(self) -> float:
        """Drop the work of jobs that ended otherwise (cancelled, expired)."""
        jobs = self.shards.jobs()
        keys = self.room.inside() if self.claims is not None else []
        held = {split_key(key)[0] for key in keys}
        states = self.store.jobs.states(jobs | held) if jobs or held else {}
        over = {job for job in jobs | held if states.get(job, JobState.FAILED) in _DROP}
        for job in over & jobs:
            for shard in self.shards.of_job(job):
                self._drop(shard)
        dropped = [key for key in keys if split_key(key)[0] in over]
        if dropped:
            self.engine.send(msg.Abort(dropped))
            for key in dropped:
                self.room.gone(key)
        return WATCH_EVERY_S

    def _drop(self, shard: OpenShard) -> None:
        keys = list(shard.left)
        if self.offers is not None:
            self.offers.withdraw(keys)
        self.engine.send(msg.Abort(list(map(str, keys))))
        self.shards.leave(keys)

    def _on_fenced(self, epoch: int) -> None:
        if self.offers is not None:
            self.offers.withdraw()
        if self.claims is not None:
            self.claims.clear()
            self.room.clear()
        self.engine.send(msg.Reset(epoch))
        for shard in self.shards.clear():
            shard.on_over(shard)  # not ours any more: its message is acknowledged

    def drain(self, deadline_s: float) -> None:
        """Take nothing new, end what runs within the deadline, give the rest back, leave."""
        deadline = time.monotonic() + deadline_s
        self._draining = True
        if self.intake is not None:
            self.intake.close()
        if self.claims is not None:
            self.claims.stop_claiming()
        self.engine.send(msg.Drain())
        self._drained.wait(max(0.0, deadline - time.monotonic()))
        while self.offers is not None and len(self.offers) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.writer.flush(max(1.0, deadline - time.monotonic()))
        try:
            self.life.end()
        except StoreError as error:
            logger.warning("could not sign off; the reconciler will notice: %s", error)
        self.close()

    def close(self) -> None:
        """End the engine and all loops."""
        for part in (self.intake, self.offers, self.claims, self.writer):
            if part is not None:
                part.stop()
        self._loop.stop(timeout_s=1.0)
        self.engine.close()
        self.store.close()

    def die(self, error: BaseException) -> None:
        """The engine, or a part of us, failed: give back as lost, exit; never returns."""
        if not self._dying.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it, and ends the process
        logger.critical(
            "%s ends: %s: %s",
            self.name,
            type(error).__name__,
            error,
            exc_info=None if isinstance(error, EngineDied) else error,
        )
        watchdog = threading.Timer(10.0, os._exit, (EXIT_ENGINE_DIED,))
        watchdog.daemon = True
        watchdog.start()
        try:
            self.life.halt()
            self.writer.flush(3.0)
            for shard in self.shards.clear():
                self.store.shards.give_back(
                    self.life.id, shard.job, shard.shard, shard.attempt, failed=True
                )
            if self.claims is not None:
                self.store.holds.drop(
                    self.life.id, [split_key(key) for key in self.room.inside()], failed=True
                )
            self.store.workers.retire(self.life.id)
        except Exception:
            logger.exception("could not give the work back; the reconciler will")
        finally:
            os._exit(EXIT_ENGINE_DIED)


_DROP = TERMINAL_JOB_STATES - {JobState.COMPLETED} | {JobState.CANCELLING}
