"""The other ranks of an engine, as rank 0 has them.

Life of a team:

    1. `Team()`: rank 0's process starts one process for each other rank; all meet (`group`).
    2. Every rank builds its part: the same calls in the same order, since parts talk meanwhile.
    3. `ready` waits until all ranks are up.
    4. Orders (`tell`); a rank that ends, or fails, ends the engine: what is under way on rank 0 is
       aborted, and `check` raises from then on. Nothing of a step that was aborted is told
       to anybody: the engine checks before it gives events out.
    5. `close`: ranks end and are waited for, then killed. A rank whose rank 0 has gone ends at
       once (`rank`), so none is ever left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.ipc import Channel, ChannelClosed, channel_pair
from pdbatch.engine.parallel.devices import rank_devices
from pdbatch.engine.parallel.group import LIMIT_S, Group
from pdbatch.engine.parallel.messages import Answer, End, Failed, Pinned, PullEnded, Start, Up
from pdbatch.errors import EngineDied, EngineError, UsageError

logger = logging.getLogger(__name__)

_GONE_MS = 500
_MODULE = "pdbatch.engine.parallel.rank"


class Member:
    """One other rank: its process and the channel to it."""

    def __init__(self, config: EngineConfig, rank: int, meeting: Path) -> None:
        ours, theirs = channel_pair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        self.rank = rank
        self.channel: Channel[Answer] = Channel(ours, Answer)
        self.channel.send(Start(config=config, rank=rank, meeting=str(meeting)))


class Team:
    """See the module. Orders by one thread."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the ranks and meets them. Raises ConfigError, EngineError."""
        size = config.tensor_parallel_size
        devices = rank_devices(config.device, size, torch.cuda.device_count())
        self._folder = Path(tempfile.mkdtemp(prefix="pdbatch-ranks-"))
        self._failure = ""
        self._closing = False
        self.release: Callable[[], None] = lambda: None
        """Called before the group is left: graphs that hold sums keep NCCL from ending."""
        self._ended: deque[PullEnded] = deque()
        self._came = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.members: list[Member] = []
        self._group: Group | None = None
        try:
            for rank in range(1, size):
                own = replace(config, device=devices[rank])
                self.members.append(Member(own, rank, self._folder / "meeting"))
            self._watch()
            self.ready()
            self._group = Group(self._folder / "meeting", 0, size, torch.device(devices[0]))
        except BaseException as error:
            raise self.ended_by(error) from error

    @property
    def group(self) -> Group:
        """Rank 0's end of the sums."""
        assert self._group is not None, "a team that has met"
        return self._group

    def ready(self) -> None:
        """Wait until every rank is up, to meet or for steps. Raises EngineError."""
        for member in self.members:
            answer = self._answer(member)
            if not isinstance(answer, Up):
                raise EngineError(f"rank {member.rank} said {answer}")

    def tell(self, order: Any) -> None:
        """Send an order to every rank. Raises EngineDied."""
        for member in self.members:
            try:
                member.channel.send(order)
            except ChannelClosed as error:
                raise self.ended_by(error) from error

    def pinned(self) -> list[bytes]:
        """Each rank's answer to a `Pin`. Raises EngineError."""
        found = []
        for member in self.members:
            answer = self._answer(member)
            if not isinstance(answer, Pinned):
                raise EngineError(f"rank {member.rank} answered a pin with {answer}")
            found.append(answer.descriptor)
        return found

    def pulls_ended(self) -> list[PullEnded]:
        """What ranks said of pulls since the last call; never waits."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._came)
        for member in self.members:
            with contextlib.suppress(ChannelClosed):  # the watch tells, and `check` raises
                for answer in member.channel.receive_all():
                    self._take(member, answer)
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def filenos(self) -> list[int]:
        """Readable when `pulls_ended` may have something."""
        return [self._came, *(member.channel.fileno() for member in self.members)]

    def check(self) -> None:
        """Raises EngineDied if a rank has ended."""
        if self._failure:
            raise EngineDied(self._reason())

    def ended_by(self, error: BaseException) -> BaseException:
        """What to raise for an error of a step or a build: ranks that ended explain most, but for
        a mistake of the user's, which all ranks find."""
        reason = ""
        if not isinstance(error, UsageError) and (self._failure or self._one_ended()):
            reason = self._reason()
        self._failure = reason or self._failure or str(error)
        self.close(kill=True)
        return EngineDied(reason) if reason else error

    def close(self, *, kill: bool = False, timeout_s: float = 10.0) -> None:
        """End the ranks and wait for them. Idempotent."""
        self._closing = True
        for member in self.members:
            with contextlib.suppress(ChannelClosed):
                if kill:
                    member.process.kill()
                else:
                    member.channel.send(End())
        for member in self.members:
            try:
                member.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            member.channel.close()
        if self._came >= 0:
            os.close(self._came)
            self._came = -1
            self.release()
            if self._group is not None:
                with contextlib.suppress(RuntimeError):
                    self._group.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self, member: Member) -> Answer:
        """The next answer that is not the end of a pull. Raises EngineDied."""
        while True:
            try:
                answer = member.channel.receive(LIMIT_S)
            except ChannelClosed as error:
                raise self.ended_by(error) from error
            if answer is None:
                raise EngineDied(f"rank {member.rank} gave no answer in {LIMIT_S:.0f} s")
            self._take(member, answer)
            if not isinstance(answer, PullEnded):
                return answer
            os.eventfd_write(self._came, 1)

    def _take(self, member: Member, answer: Answer) -> None:
        if isinstance(answer, PullEnded):
            self._ended.append(answer)
        elif isinstance(answer, Failed):
            self._failure = f"rank {member.rank} failed: {answer.kind}: {answer.message}"
            raise EngineDied(self._failure)

    def _one_ended(self) -> bool:
        """Whether a rank's end closes soon: a sum fails before its process is quite gone."""
        poll = select.poll()
        for member in self.members:
            if member.process.poll() is not None or member.channel.fileno() < 0:
                return True
            poll.register(member.channel.fileno(), 0)
        return bool(self.members and poll.poll(_GONE_MS))

    def _reason(self) -> str:
        """Why a rank has ended: one was killed, or what one said, or its exit code.

        Those that waited for a killed one fail too, and may say so before.
        """
        if self._failure.startswith("rank"):
            return self._failure
        for member in self.members:
            code = member.process.poll()
            if code is not None and code < 0:
                return f"rank {member.rank} ended with exit code {code}"
        for member in self.members:
            with contextlib.suppress(EngineDied):
                for answer in member.channel.receive_all():
                    self._take(member, answer)
        if self._failure.startswith("rank"):
            return self._failure
        for member in self.members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = member.process.wait(_GONE_MS / 1000)
                return f"rank {member.rank} ended with exit code {code}"
        return self._failure

    def _watch(self) -> None:
        """Note the end of a rank, and end what waits for it."""

        def watch() -> None:
            poll = select.poll()
            for member in self.members:
                poll.register(member.channel.fileno(), 0)  # hang-up alone
            poll.poll()
            if self._closing:
                return
            self._failure = self._failure or "a rank has ended"
            logger.error("a rank of this engine has ended")
            if self._group is not None:
                with contextlib.suppress(RuntimeError):
                    self._group.abort()

        threading.Thread(target=watch, name="pdbatch-ranks", daemon=True).start()
