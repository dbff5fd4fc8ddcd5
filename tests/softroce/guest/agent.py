"""Runs in the machine what the host says, over a virtio port; standard library alone.

One JSON object a line, both ways. From the host:

    {"do": "start", "id": 1, "argv": [...], "cwd": "/x", "env": {...}, "apart": false}
    {"do": "input", "id": 1, "data": "text"}        data null: end of file
    {"do": "signal", "id": 1, "number": 9}          to the command and all that it started

and back:

    {"is": "ready"}                                 once; again after a reset
    {"is": "started", "id": 1, "pid": 77}
    {"is": "output" | "errors", "id": 1, "data": "text"}    errors: where they are to be apart
    {"is": "signalled", "id": 1}                    after SIGSTOP: every thread of it has stopped
    {"is": "ended", "id": 1, "status": 0}           after its last output; -9: by signal 9
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PORT = "lab.agent"


def port(name: str) -> Path:
    """The device of a virtio port. Waits until it is there."""
    while True:
        for entry in Path("/sys/class/virtio-ports").glob("vport*"):
            if (entry / "name").read_text(encoding="ascii").strip() == name:
                return Path("/dev") / entry.name
        time.sleep(0.05)


class Agent:
    """The commands that run, by the host's numbers."""

    def __init__(self, hears: IO[bytes], says: IO[bytes]) -> None:
        self._hears, self._says = hears, says
        self._lock = threading.Lock()
        self._commands: dict[int, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        """Until the machine ends."""
        self._says.write(b"\n")  # ends what was under way when the machine was reset
        self._say({"is": "ready"})
        while line := self._hears.readline():
            message = json.loads(line)
            if message["do"] != "start":
                getattr(self, f"_{message['do']}")(message)
                continue
            try:
                self._start(message)
            except OSError as error:
                number = message["id"]
                self._say({"is": "output", "id": number, "data": f"{error}\n"})
                self._say({"is": "ended", "id": number, "status": 127})

    def _start(self, message: dict[str, Any]) -> None:
        number, apart = message["id"], message["apart"]
        command = subprocess.Popen(
            message["argv"],
            cwd=message["cwd"],
            env=message["env"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if apart else subprocess.STDOUT,
            start_new_session=True,
        )
        self._commands[number] = command
        self._say({"is": "started", "id": number, "pid": command.pid})
        readers = [self._thread(self._carry, number, "output", command.stdout)]
        if apart:
            readers.append(self._thread(self._carry, number, "errors", command.stderr))
        self._thread(self._await, number, command, readers)

    def _input(self, message: dict[str, Any]) -> None:
        command = self._commands.get(message["id"])
        stdin = command.stdin if command is not None else None
        if stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):  # it ended, or ends now
            if message["data"] is None:
                stdin.close()
            else:
                stdin.write(message["data"].encode())
                stdin.flush()

    def _signal(self, message: dict[str, Any]) -> None:
        number, what = message["id"], message["number"]
        command = self._commands.get(number)
        if command is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, what)
                if what == signal.SIGSTOP:
                    _await_stop(command.pid)
        self._say({"is": "signalled", "id": number})

    def _carry(self, number: int, kind: str, pipe: IO[bytes]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        while data := os.read(pipe.fileno(), 65536):
            self._say({"is": kind, "id": number, "data": decoder.decode(data)})

    def _await(
        self, number: int, command: subprocess.Popen[bytes], readers: list[threading.Thread]
    ) -> None:
        status = command.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)  # what it left behind would hold the pipes
        for reader in readers:
            reader.join(10)
        del self._commands[number]
        for pipe in (command.stdin, command.stdout, command.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._say({"is": "ended", "id": number, "status": status})

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._says.write(json.dumps(message).encode() + b"\n")
            self._says.flush()

    def _thread(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, daemon=True)
        thread.start()
        return thread


def _await_stop(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = [path.read_bytes() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        if all(stat.rpartition(b")")[2].split()[0] in (b"T", b"Z") for stat in stats):
            return
        time.sleep(0.001)


def _await_host(number: int) -> None:
    """A write to a port without a host would never come back. Raises TimeoutError."""
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    deadline = time.monotonic() + 30
    while any(event & select.POLLHUP for _, event in poll.poll(1000)):
        if time.monotonic() > deadline:
            raise TimeoutError("there is no host")
        time.sleep(0.05)


if __name__ == "__main__":
    number = os.open(port(PORT), os.O_RDWR)
    _await_host(number)
    with os.fdopen(number, "rb") as hears, os.fdopen(os.dup(number), "wb") as says:
        Agent(hears, says).serve()
