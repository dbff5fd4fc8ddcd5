"""The main process's line to its engine: started, awaited, listened to by a thread, ended.

`on_event` is called in that thread, `on_end` there too, once, when the engine ended or an event
could not be dealt with; not after `close` has begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.ipc import ChannelClosed
from pdbatch.engine.messages import Command, EngineInfo, Event, Fatal, Ready
from pdbatch.engine.spawn import EngineProcess
from pdbatch.errors import EngineDied, EngineError


class EngineLink:
    """`info` is what the engine turned out to be."""

    info: EngineInfo

    def __init__(self, config: EngineConfig, while_waiting: Callable[[], None]) -> None:
        """Starts the engine and waits until it is ready.

        `while_waiting` is called twice a second until then; what it raises ends the engine. Raises
        EngineError with what kept the engine from starting.
        """
        self._engine = EngineProcess.start(config)
        self._closing = False
        try:
            self.info = self._await_ready(while_waiting)
        except BaseException:
            self._engine.kill()
            raise

    def _await_ready(self, while_waiting: Callable[[], None]) -> EngineInfo:
        while True:
            event = self._engine.channel.receive(timeout_s=0.5)
            while_waiting()
            if isinstance(event, Ready):
                return event.info
            if isinstance(event, Fatal):
                raise EngineError(f"{event.error}: {event.message}")

    def listen(
        self, on_event: Callable[[Event], None], on_end: Callable[[BaseException], None]
    ) -> None:
        """Hand over what the engine says from now on."""

        def read() -> None:
            try:
                while (event := self._engine.channel.receive()) is not None:
                    on_event(event)
            except ChannelClosed as error:
                if not self._closing:
                    on_end(EngineDied(str(error)))
            except BaseException as error:
                on_end(error)

        threading.Thread(target=read, name="pdbatch-engine", daemon=True).start()

    def send(self, command: Command) -> None:
        """From any thread. Raises ChannelClosed when the engine has ended."""
        self._engine.channel.send(command)

    def close(self, timeout_s: float = 5.0) -> None:
        """Ask the engine to end; kill it if it does not."""
        self._closing = True
        self._engine.close(timeout_s)
