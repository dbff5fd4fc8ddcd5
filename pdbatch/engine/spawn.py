"""Starting an engine process and ending it: the main process's handle. Imports no torch.

Life of an engine process, as its parent sees it:

    1. `EngineProcess.start`: spawned with one end of a socket pair; the configuration is sent.
    2. `Ready` (or `Fatal`) comes over `channel`, after the model is loaded: seconds to minutes.
    3. Commands and events, see `pdbatch.engine.messages`.
    4. `Shutdown`, or closing the channel, ends it; so does the death of the parent.
    5. `close` waits, then kills; it never leaves a process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.ipc import Channel, ChannelClosed, channel_pair, main_end
from pdbatch.engine.messages import Event, Shutdown

_STDERR = 2


@dataclass(slots=True)
class EngineProcess:
    """A running engine: `channel` to talk to it, `process` to watch it."""

    process: subprocess.Popen[bytes]
    channel: Channel[Event]

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        *,
        env: Mapping[str, str] | None = None,
        stderr: IO[bytes] | None = None,
    ) -> EngineProcess:
        """Spawn `python -m pdbatch.engine.child` and send it its configuration.

        `env` replaces the environment; `stderr` takes the child's stdout and stderr (the
        parent's stderr otherwise). The child is in a process group of its own, so that ^C reaches
        the main process alone. Returns at once; wait for `Ready` on `channel`.
        """
        ours, theirs = channel_pair()
        target = stderr if stderr is not None else _STDERR
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "pdbatch.engine.child", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=dict(env) if env is not None else dict(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                process_group=0,
            )
        channel = main_end(ours)
        channel.send(config)
        return cls(process, channel)

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def close(self, timeout_s: float = 10.0) -> int:
        """Ask it to end, wait, kill if it does not; its exit code (negative: the signal)."""
        with contextlib.suppress(ChannelClosed):
            self.channel.send(Shutdown())
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self.channel.close()
        return self.process.wait()

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self.alive():
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
