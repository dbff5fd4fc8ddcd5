"""What a test in a machine asks of the lab, as it asks for it: inside/lab_hooks.py is its side.

One JSON object a line over the port lab.hooks, an answer for each, in any order:

    {"id": 1, "do": "start", "argv": [...]}    on the other machine -> {"process": 1, "pid": 77}
    {"id": 2, "do": "line" | "say" | "signal" | "wait" | "kill", "process": 1, …}
    {"id": 3, "do": "reset"}                   the other machine, at once
    {"id": 4, "do": "ready"}                   when it is up (again), with its RDMA devices
    {"id": 5, "do": "plug", "whose": "own" | "other", "up": false, "index": 0}
    {"id": 5, …} -> {"id": 5, "error": "…"}    what went wrong
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.softroce.machine import Machine, Process

Message = dict[str, Any]


class Hooks:
    """Answers one machine until it is gone."""

    def __init__(self, machine: Machine, other: Machine | None) -> None:
        self._machine, self._other = machine, other
        self._processes: dict[int, Process] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, name=f"hooks {machine.name}", daemon=True).start()

    def _serve(self) -> None:
        with self._machine.qemu.hooks.makefile("rb") as asked:
            for line in asked:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # whoever asked was cut short
                threading.Thread(target=self._answer, args=(message,), daemon=True).start()

    def _answer(self, message: Message) -> None:
        work: Callable[[Message], Message | None] = getattr(self, f"_{message['do']}")
        try:
            answer = work(message) or {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps({**answer, "id": message["id"]}).encode() + b"\n"
        with self._lock:
            self._machine.qemu.hooks.sendall(data)

    def _peer(self) -> Machine:
        if self._other is None:
            raise LookupError("there is no other machine")
        return self._other

    def _start(self, message: Message) -> Message:
        process = self._peer().start(
            message["argv"],
            cwd=Path(message["cwd"]),
            environ=message["environ"],
            apart=True,
        )
        with self._lock:
            number = len(self._processes) + 1
            self._processes[number] = process
        return {"process": number, "pid": process.pid}

    def _line(self, message: Message) -> Message:
        process = self._processes[message["process"]]
        text = process.line(message["timeout_s"])
        return {"line": text, "errors": process.errors[-2000:]}

    def _say(self, message: Message) -> None:
        self._processes[message["process"]].say(message["text"])

    def _signal(self, message: Message) -> None:
        self._processes[message["process"]].signal(message["number"])

    def _kill(self, message: Message) -> None:
        self._processes[message["process"]].kill()

    def _wait(self, message: Message) -> Message:
        process = self._processes[message["process"]]
        status = process.wait(message["timeout_s"])
        return {"status": status, "output": process.output, "errors": process.errors}

    def _reset(self, message: Message) -> None:
        self._peer().reset()

    def _ready(self, message: Message) -> None:
        self._peer().wait_ready()

    def _plug(self, message: Message) -> None:
        machine = self._machine if message["whose"] == "own" else self._peer()
        machine.plug(message["up"], message["index"])
