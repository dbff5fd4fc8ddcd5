"""A machine that runs what it is told.

    Machine(kernel, …)    boots; the first command waits until it is there
    run                   a command to its end, like subprocess.run
    start                 a command whose lines are heard and answered while it runs
    reset, pull, plug     the machine's misfortunes
    close                 the power is gone; nothing of it stays but what lies in `folder`

Inside, the host's root is seen and may be written, but what is written goes with the machine; only
/lab, which is `folder` here, is shared. Commands run as root with the environment that `start` is
given and nothing of the host's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.softroce.kernel import GUEST, Kernel
from tests.softroce.qemu import Qemu

PROJECT = Path(__file__).resolve().parents[2]
_PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


class MachineLost(Exception):
    """It ended, or was reset, while a command ran or before one could."""


class Process:
    """A command in a machine."""

    def __init__(
        self, machine: Machine, number: int, argv: Sequence[str], hears: Callable[[str], object]
    ) -> None:
        """`hears` is called with each piece of output."""
        self._machine, self._number, self._hears = machine, number, hears
        self.args = list(argv)
        self.pid = 0
        self.status: int | None = None
        """None while it runs; -9 when signal 9 ended it."""
        self.output = ""
        self.errors = ""
        """What it wrote to stderr, where that was asked to be apart."""
        self.num_signalled = 0
        self.lost = ""
        self._heard = 0

    def line(self, timeout_s: float = 60) -> str:
        """What it says next, without the end of line; "" when it ended without more."""
        self._machine.wait_for(
            lambda: "\n" in self.output[self._heard :] or self._over(),
            timeout_s,
            f"{self.args} says nothing",
        )
        text, newline, _ = self.output[self._heard :].partition("\n")
        self._heard += len(text) + len(newline)
        return text

    def say(self, text: str) -> None:
        """One line for it to read."""
        self._machine.tell({"do": "input", "id": self._number, "data": text + "\n"})

    def signal(self, number: int, timeout_s: float = 20) -> None:
        """To it and all that it started. After SIGSTOP: they have stopped."""
        before = self.num_signalled
        self._machine.tell({"do": "signal", "id": self._number, "number": number})
        self._machine.wait_for(
            lambda: self.num_signalled > before or self._over(), timeout_s, "no answer to a signal"
        )

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises MachineLost; TimeoutExpired, and it runs on."""
        self._machine.wait_for(self._over, timeout_s, self.args, lambda: self.output)
        if self.status is None:
            raise MachineLost(f"{self.lost} during {self.args}; so far:\n{self.output}")
        return self.status

    def kill(self) -> None:
        """SIGKILL to it and all that it started; they are gone when this returns."""
        if not self._over():
            self.signal(signal.SIGKILL)
            self._machine.wait_for(self._over, 20, "it does not die")

    def _over(self) -> bool:
        return self.status is not None or bool(self.lost)


class Machine:
    """See the module."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        rdma: str = "alone 1",
        number: int = 1,
        num_cpus: int = 1,
        memory_mb: int = 1536,
        cables: Sequence[Any] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`rdma`: the words of guest/rdma.sh; "" is a machine without such a device."""
        self.name = f"lab{number}"
        self.environ = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        self.environ |= environ or {}
        self._scratch = Path(tempfile.mkdtemp(prefix="softroce-"))
        self.folder = self._scratch / "lab"
        self.folder.mkdir()
        shutil.copy(GUEST / "boot.sh", self.folder)
        words = {"KERNEL": kernel.version, "MODULES": str(kernel.modules), "NAME": self.name}
        words |= {"RDMA": rdma, "RDMA_SCRIPT": str(GUEST / "rdma.sh")}
        words |= {"PYTHON": sys.executable, "AGENT": str(GUEST / "agent.py")}
        text = "".join(f"{key}='{value}'\n" for key, value in words.items())
        (self.folder / "machine.env").write_text(text)
        self.num_boots = self._num_resets = 0
        self._processes: dict[int, Process] = {}
        self._number = 0
        self._changed = threading.Condition()
        self.gone = False
        self.qemu = Qemu(
            kernel,
            self.folder,
            number=number,
            num_cpus=num_cpus,
            memory_mb=memory_mb,
            cables=cables,
        )
        self._hears: IO[bytes] = self.qemu.agent.makefile("rb")
        self._thread = threading.Thread(target=self._listen, name=self.name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait_ready(self, timeout_s: float = 240) -> None:
        """Until it has come up. Raises MachineLost with what the kernel said."""
        try:
            self.wait_for(
                lambda: self.num_boots > self._num_resets or self.gone, timeout_s, "no boot"
            )
        except subprocess.TimeoutExpired:
            raise MachineLost(f"not up in {timeout_s} s:\n{self.qemu.last_words()}") from None
        if self.gone:
            raise MachineLost(f"it ended:\n{self.qemu.last_words()}")

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path = PROJECT,
        environ: Mapping[str, str] | None = None,
        apart: bool = False,
        hears: Callable[[str], object] = str,
    ) -> Process:
        """Run a command; `apart` keeps stderr out of its output."""
        self.wait_ready()
        with self._changed:
            self._number += 1
            process = self._processes[self._number] = Process(self, self._number, argv, hears)
        self.tell(
            {
                "do": "start",
                "id": process._number,
                "argv": list(argv),
                "cwd": str(cwd),
                "env": {**self.environ, **(environ or {})},
                "apart": apart,
            }
        )
        self.wait_for(lambda: process.pid != 0 or process._over(), 60, "the command does not start")
        return process

    def run(
        self,
        argv: Sequence[str] | str,
        timeout_s: float = 120,
        *,
        cwd: Path = PROJECT,
        environ: Mapping[str, str] | None = None,
        hears: Callable[[str], object] = str,
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end; stdout and stderr are both in `stdout`, and `hears` is told them
        as they come. A string is bash's.

        Raises MachineLost; subprocess.TimeoutExpired with the output so far, and it is killed.
        """
        words = ["/bin/bash", "-c", argv] if isinstance(argv, str) else list(argv)
        process = self.start(words, cwd=cwd, environ=environ, hears=hears)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(subprocess.TimeoutExpired):  # nor does the machine answer
                process.kill()
            raise
        return subprocess.CompletedProcess(words, status, process.output)

    def reset(self) -> None:
        """As its button would. What ran is lost; it boots again, which `wait_ready` awaits."""
        with self._changed:
            self._num_resets = self.num_boots
        self.qemu.tell("system_reset")

    def plug(self, up: bool, index: int = 0) -> None:
        """The cable of a link, put in or pulled out; the other machine's end sees nothing."""
        self.qemu.tell("set_link", name=f"cable{index}", up=up)

    def close(self) -> None:
        """See the module."""
        self.qemu.kill()
        self._thread.join()
        self._hears.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # --- the agent

    def tell(self, message: dict[str, Any]) -> None:
        """To the agent."""
        with self._changed:
            try:
                self.qemu.agent.sendall(json.dumps(message).encode() + b"\n")
            except OSError as error:
                raise MachineLost(f"{self.name} ended: {error}") from error

    def wait_for(
        self,
        holds: Callable[[], bool],
        timeout_s: float,
        what: str | list[str],
        output: Callable[[], str] = str,
    ) -> None:
        """Until it holds, looked at whenever the machine says something. Raises TimeoutExpired."""
        with self._changed:
            if not self._changed.wait_for(holds, timeout_s):
                raise subprocess.TimeoutExpired(what, timeout_s, output())

    def _listen(self) -> None:
        """A thread of its own, until the machine is gone."""
        with contextlib.suppress(ConnectionError):
            for line in self._hears:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # cut short by a reset
                with self._changed:
                    self._take(message)
                    self._changed.notify_all()
        with self._changed:
            self.gone = True
            self._lose(f"{self.name} ended")
            self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["is"]
        if kind == "ready":
            self.num_boots += 1
            self._lose(f"{self.name} was reset")
            return
        process = self._processes.get(message["id"])
        if process is None:
            return
        if kind == "started":
            process.pid = message["pid"]
        elif kind == "signalled":
            process.num_signalled += 1
        elif kind == "output":
            process.output += message["data"]
            process._hears(message["data"])
        elif kind == "errors":
            process.errors += message["data"]
        elif kind == "ended":
            process.status = message["status"]
            del self._processes[message["id"]]

    def _lose(self, why: str) -> None:
        for process in self._processes.values():
            process.lost = why
        self._processes.clear()
