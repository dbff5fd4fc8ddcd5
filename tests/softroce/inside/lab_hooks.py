"""The lab as a test inside a machine sees it.

    LAB.start(argv)            a Peer on the other machine
    LAB.reset_other()          its reset button; LAB.wait_other() until it is up again
    LAB.plug("own", up=False)  a cable pulled out: "own", or "other" for the other machine's end
    own_link(up=False)         this machine's interface, taken down by its administrator

Answers come over a virtio port, whose other end is the process that started the machines
(hooks.py); that works whatever became of the network.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

OWN_ADDRESS, OTHER_ADDRESS = "192.0.2.1", "192.0.2.2"
"""Of the first and the second machine on their first link; tests run on the first."""


class LabError(Exception):
    """The lab could not do it."""


class Lab:
    """See the module. One question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(os.getpid() << 20)
        self._file: Any = None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One question. Raises LabError."""
        with self._lock:
            if self._file is None:
                self._file = _port("lab.hooks").open("r+b", buffering=0)
                self._left = b""
            number = next(self._numbers)
            self._file.write(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = {}
            while answer.get("id") != number:
                answer = json.loads(self._line())
        if "error" in answer:
            raise LabError(answer["error"])
        return answer

    def start(self, argv: list[str], environ: dict[str, str] | None = None) -> Peer:
        """A process of the other machine."""
        return Peer(self, argv, environ or {})

    def python(self, code: str, environ: dict[str, str] | None = None) -> Peer:
        """The same Python there."""
        return self.start([sys.executable, "-c", code], environ)

    def reset_other(self) -> None:
        """At once; what ran there is gone."""
        self.ask("reset")

    def wait_other(self) -> None:
        """Until it is up, with its RDMA devices."""
        self.ask("ready")

    def plug(self, whose: str, *, up: bool, index: int = 0) -> None:
        """See the module."""
        self.ask("plug", whose=whose, up=up, index=index)

    def _line(self) -> bytes:
        while b"\n" not in self._left:
            data = self._file.read(65536)
            if not data:
                raise LabError("the lab is gone")
            self._left += data
        line, _, self._left = self._left.partition(b"\n")
        return line


class Peer:
    """A process of the other machine; what the suites ask of `kvxfer.testing.peers.Peer`."""

    def __init__(self, lab: Lab, argv: list[str], environ: dict[str, str]) -> None:
        self._lab = lab
        found = lab.ask("start", argv=argv, environ=environ, cwd=str(Path.cwd()))
        self.number, self.pid = found["process"], found["pid"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def line(self, timeout_s: float = 60) -> str:
        """What it says next."""
        answer = self._lab.ask("line", process=self.number, timeout_s=timeout_s)
        assert answer["line"], f"the other machine's process said nothing: {answer['errors']}"
        return str(answer["line"])

    def say(self, text: str) -> None:
        """One line for it to read."""
        self._lab.ask("say", process=self.number, text=text)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._lab.ask("kill", process=self.number)

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread of it has stopped."""
        self._lab.ask("signal", process=self.number, number=int(signal.SIGSTOP))

    def go_on(self) -> None:
        """SIGCONT."""
        self._lab.ask("signal", process=self.number, number=int(signal.SIGCONT))

    def wait(self, timeout_s: float = 60) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        found = self._lab.ask("wait", process=self.number, timeout_s=timeout_s)
        return found["status"], found["output"], found["errors"]


def own_link(*, up: bool, index: int = 0) -> None:
    """See the module."""
    word = "up" if up else "down"
    subprocess.run(["ip", "link", "set", f"rd{index}", word], check=True)


def _port(name: str) -> Path:
    for entry in Path("/sys/class/virtio-ports").glob("vport*"):
        if (entry / "name").read_text(encoding="ascii").strip() == name:
            return Path("/dev") / entry.name
    raise LabError(f"this machine has no port {name}: it is none of the lab's")


LAB = Lab()
