"""The engine's process: `python -m pdbatch.engine.child --fd N`.

    1. The first frame on the socket is the `EngineConfig`.
    2. The engine is built; `Ready`, or `Fatal` and exit code 1.
    3. Loop: all commands that have come, one step, its events. While a step finds nothing to do,
       it sleeps until a command comes, a pull ends or `Stats` are due.
    4. `Shutdown`: what is there is dropped, the block accounts are checked, exit code 0.
    5. The socket's end (the parent is gone): the process ends at once, whatever it was doing.

SIGINT is ignored: ^C is the main process's affair, which then says what shall happen.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from pdbatch.engine.base import EngineBase
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.ipc import Channel, ChannelClosed, engine_end
from pdbatch.engine.messages import Command, Fatal, Ready, Reset, Shutdown
from pdbatch.errors import in_words

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """The process's whole life; its exit code."""
    parser = argparse.ArgumentParser(description="pdbatch's engine process, started by a worker")
    parser.add_argument("--fd", type=int, required=True, help="its end of the socket pair")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=os.environ.get("PDBATCH_LOG_LEVEL", "INFO").upper(),
        format="%(asctime)s %(levelname)s engine[%(process)d] %(name)s: %(message)s",
    )
    sock = socket.socket(fileno=parser.parse_args(argv).fd)
    end_with(sock)
    channel = engine_end(sock)
    try:
        config = channel.receive_as(EngineConfig)
        engine = make_engine(config)
        channel.send(Ready(engine.info))
        with traced(engine, config):
            serve(engine, channel, config.stats_interval_s)
    except ChannelClosed:
        return 0
    except BaseException as error:
        logger.exception("the engine ends")
        with contextlib.suppress(ChannelClosed):
            channel.send(Fatal(type(error).__name__, in_words(error)))
        return 1
    return 0


def make_engine(config: EngineConfig) -> EngineBase:
    """The engine that the configuration names."""
    if config.engine == "null":
        from pdbatch.engine.null import NullEngine

        return NullEngine(config)
    from pdbatch.engine.build import build_engine

    return build_engine(config)


@contextlib.contextmanager
def traced(engine: EngineBase, config: EngineConfig) -> Iterator[None]:
    """With a trace of what the engine does, where the configuration asks for one."""
    if not config.trace or config.engine == "null":
        yield
        return
    from pdbatch.engine.trace import trace_engine

    tracer = trace_engine(engine, config.trace, config.worker)
    logger.info("tracing into %s", tracer.path)
    try:
        yield
    finally:
        tracer.close()


def serve(engine: EngineBase, channel: Channel[Command], stats_interval_s: float) -> None:
    """The loop, until `Shutdown`. Raises ChannelClosed at the socket's end."""
    gc.collect()
    gc.freeze()  # the model's objects are never garbage: do not look at them again
    clock = StatsClock(engine, channel, stats_interval_s)
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    if engine.fileno() >= 0:
        poll.register(engine.fileno(), select.POLLIN)
    while True:
        for command in channel.receive_all():
            if isinstance(command, Shutdown):
                _shut_down(engine)
                return
            engine.handle(command)
        for event in engine.step():
            channel.send(event)
        clock.tick()
        if not engine.busy and not channel.pending:
            poll.poll(clock.left_s * 1000)


class StatsClock:
    """Sends `Stats` at the configured pace, and when the engine turns busy or idle."""

    def __init__(self, engine: EngineBase, channel: Channel[Command], every_s: float) -> None:
        self._engine = engine
        self._channel = channel
        self._every_s = every_s
        self._due = 0.0
        self._busy = False

    @property
    def left_s(self) -> float:
        """Seconds until the next are due."""
        return max(0.0, self._due - time.monotonic())

    def tick(self) -> None:
        """Send if it is time."""
        now, busy = time.monotonic(), self._engine.busy
        if now >= self._due or busy != self._busy:
            self._due, self._busy = now + self._every_s, busy
            self._channel.send(self._engine.stats())


def _shut_down(engine: EngineBase) -> None:
    """Drop everything, check the accounts, stop serving."""
    engine.handle(Reset(0))
    engine.check()
    engine.close()


def end_with(sock: socket.socket) -> None:
    """End this process when the peer's end closes, also during a load or a long step."""

    def watch() -> None:
        poll = select.poll()
        poll.register(sock.fileno(), 0)  # hang-up alone
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="pdbatch-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
