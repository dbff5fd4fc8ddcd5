"""One supervised process: started, watched, ended together with all that it started.

1. `start`: the process leads a group of its own, so that a Ctrl-C in the terminal reaches the
   supervisor alone. On Linux the kernel kills it when the supervisor's thread ends.
2. Its output goes to a file, or line by line to a function.
3. When it ends, however it ends, what is left of its group is killed (an engine, say).
4. `terminate` asks the process alone, so that it can end its own children in order;
   `kill` ends the whole group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_MAX_LOG_BYTES = 16 * 2**20

OnLine = Callable[[str, str], None]
"""Called with (process name, line) from a thread of the process's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """What to run."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The whole environment."""
    log: Path | None = None
    """Output is added to this file; None: given to `on_line`."""
    stops_last: bool = False
    """Others need it to stop in order (Redis)."""


class Child:
    """One process after the other for one spec; at most one at a time.

    `on_exit` is called from another thread when the process ended and was not yet reaped.
    """

    def __init__(self, spec: ProcessSpec, on_exit: Callable[[], None], on_line: OnLine) -> None:
        self.spec = spec
        self._on_exit = on_exit
        self._on_line = on_line
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """The process's id, or None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process. Raises OSError when the program cannot be run."""
        assert self._process is None, f"{self.spec.name} runs already"
        output: IO[bytes] | int = self._open_log() if self.spec.log else subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                self.spec.argv,
                env=dict(self.spec.env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_die_with_parent(),
            )
        finally:
            if not isinstance(output, int):
                output.close()
        if self._process.stdout:
            self._reader = _thread(self._read_lines, self._process.stdout)
        _thread(self._watch, self._process.pid)

    def poll(self) -> int | None:
        """The exit code (negative: minus the signal) once the process ended, else None.

        Reaps the process and kills the rest of its group.
        """
        process = self._process
        if process is None or not _has_ended(process.pid):
            return None
        self._signal_group(signal.SIGKILL)  # before reaping: until then the group's id is ours
        code = process.wait()
        if self._reader:
            self._reader.join(timeout=5)
        self._process = self._reader = None
        return code

    def terminate(self) -> None:
        """Asks the process to end in order."""
        if self._process:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the whole group at once."""
        if self._process:
            self._signal_group(signal.SIGKILL)

    def log_tail(self, max_bytes: int = 65536) -> str:
        """The end of what the latest life wrote to its log file."""
        if self.spec.log is None or not self.spec.log.exists():
            return ""
        with self.spec.log.open("rb") as file:
            file.seek(max(self._log_start, self.spec.log.stat().st_size - max_bytes))
            return file.read(max_bytes).decode(errors="replace")

    def _open_log(self) -> IO[bytes]:
        path = self.spec.log
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        file = path.open("ab")
        self._log_start = file.tell()
        return file

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _read_lines(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._on_line(self.spec.name, line.decode(errors="replace").rstrip("\r\n"))

    def _watch(self, pid: int) -> None:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._on_exit()


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _thread(target: Callable[..., None], argument: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=(argument,), daemon=True)
    thread.start()
    return thread


def _die_with_parent() -> Callable[[], None] | None:
    """What the new process does before the program: ask to be killed with its parent."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask
