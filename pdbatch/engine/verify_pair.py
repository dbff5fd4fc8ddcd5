"""A prefill and a decode engine side by side, and what lies between them in the real world.

In place of main processes, registry and database: a descriptor goes straight to the decode
engine, a pull that ended straight back to the prefill engine. Engines are processes
(`ProcessSide`) or objects in this process (`LocalSide`).
"""

from __future__ import annotations

import select
from types import TracebackType

from pdbatch.engine.build import build_engine
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.messages import (
    Adopt,
    Adoption,
    Command,
    Drain,
    Drained,
    EngineRequest,
    Event,
    Fatal,
    Finished,
    Prefilled,
    Pulled,
    PullFailed,
    Ready,
    Stats,
    Submit,
    Unpin,
)
from pdbatch.engine.spawn import EngineProcess
from pdbatch.errors import EngineDied, InvariantError
from pdbatch.request import RequestOutput

_START_S = 600.0
_SILENCE_S = 300.0


class LocalSide:
    """An engine in this process."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.engine = build_engine(config, loaded)
        self.stats: Stats | None = None

    def send(self, command: Command) -> None:
        """Give the engine a command."""
        self.engine.handle(command)

    def events(self) -> list[Event]:
        """What it has to say now; does a step."""
        events = self.engine.step()
        self.stats = self.engine.stats()
        return events

    def fileno(self) -> int:
        """Readable when it may have more to say."""
        return self.engine.fileno()

    @property
    def busy(self) -> bool:
        """Whether another step may find something to do, or the counts are still to be taken."""
        return self.engine.busy or self.stats is None

    def end(self) -> str | None:
        """End it; what was wrong with its accounts."""
        try:
            self.engine.check()
        except InvariantError as error:
            return str(error)
        finally:
            self.engine.close()
        return None


class ProcessSide:
    """An engine in a process of its own."""

    busy = False

    def __init__(self, config: EngineConfig) -> None:
        self.stats: Stats | None = None
        self._role = config.role
        self._process = EngineProcess.start(config)
        self._poll = select.poll()
        self._poll.register(self._process.channel.fileno(), select.POLLIN)
        self._ready = False

    def send(self, command: Command) -> None:
        """Give the engine a command."""
        self._process.channel.send(command)

    def events(self) -> list[Event]:
        """What it has to say now; first waits until it is ready. Raises EngineDied."""
        channel = self._process.channel
        if not self._ready:
            event = channel.receive(_START_S)
            if isinstance(event, Fatal):
                raise EngineDied(f"the {self._role} engine: {event.error}: {event.message}")
            if not isinstance(event, Ready):
                raise EngineDied(f"the {self._role} engine did not start: {event}")
            self._ready = True
        if not (channel.pending or self._poll.poll(0)):
            return []
        events = channel.receive_all()
        for event in events:
            if isinstance(event, Stats):
                self.stats = event
            if isinstance(event, Fatal):
                raise EngineDied(f"the {self._role} engine: {event.error}: {event.message}")
        return [event for event in events if not isinstance(event, Stats)]

    def fileno(self) -> int:
        """Readable when it may have more to say."""
        return self._process.channel.fileno()

    def end(self) -> str | None:
        """End it; the process checks its own accounts and says so by its exit code."""
        code = self._process.close()
        return None if code == 0 else f"the {self._role} engine exited with {code}"


class Pair:
    """Both engines, ended by `with`."""

    def __init__(self, prefill: LocalSide | ProcessSide, decode: LocalSide | ProcessSide) -> None:
        self.prefill = prefill
        self.decode = decode
        self.failed_pulls = 0
        self._ended = False
        self._requests: dict[str, EngineRequest] = {}
        self._outputs: dict[str, RequestOutput] = {}

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._ended:
            self.prefill.end()
            self.decode.end()

    def run(self, requests: list[EngineRequest]) -> dict[str, RequestOutput]:
        """Results by key. Raises EngineDied if an engine ends or falls silent."""
        self._requests = {request.key: request for request in requests}
        self.prefill.send(Submit(requests))
        while len(self._outputs) < len(self._requests):
            self._turn()
        return self._outputs

    def finish(self) -> str | None:
        """Drain and end both; what was wrong: blocks that leaked, accounts that do not add up."""
        problem = None
        for name, side in (("prefill", self.prefill), ("decode", self.decode)):
            side.send(Drain())
            while not any(isinstance(event, Drained) for event in side.events()):
                _wait(side)
            side.stats = None  # only counts taken after the end tell
            while side.stats is None:
                _wait(side)
                side.events()
            if side.stats.used_blocks:
                problem = f"the {name} engine leaked {side.stats.used_blocks} blocks"
        self._ended = True
        ends = [self.prefill.end(), self.decode.end()]
        return problem or ends[0] or ends[1]

    def _turn(self) -> None:
        events = [*self.prefill.events(), *self.decode.events()]
        for event in events:
            self._on_event(event)
        if not events:
            _wait(self.prefill, self.decode)

    def _on_event(self, event: Event) -> None:
        match event:
            case Prefilled(handoffs):
                items = [Adoption(h.handoff_id, h.descriptor) for h in handoffs]
                self.decode.send(Adopt(items))
            case Pulled(handoff_ids):
                self.prefill.send(Unpin(handoff_ids))
            case PullFailed(handoff_id, key, _code, _message):
                self.failed_pulls += 1
                self.prefill.send(Unpin([handoff_id]))
                self.prefill.send(Submit([self._requests[key]]))
            case Finished(outputs):
                self._outputs |= {output.key: output for output in outputs}
            case _:
                pass


def _wait(*sides: LocalSide | ProcessSide) -> None:
    """Until one of them may have something to say. Raises EngineDied after a long silence."""
    if any(side.busy for side in sides):
        return
    if not select.select(sides, [], [], _SILENCE_S)[0]:
        raise EngineDied(f"no word from the engines for {_SILENCE_S} s")
