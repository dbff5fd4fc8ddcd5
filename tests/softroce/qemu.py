"""One QEMU process: its command line, its channels, its monitor.

The channels are socket pairs that the process inherits, so nothing listens anywhere:

    agent    commands for the machine, their output (guest/agent.py)
    hooks    what a test in the machine asks of the lab (hooks.py)
    monitor  QEMU's own: reset, cables

The processor is emulated, unless SOFTROCE_ACCEL names another way ("kvm").
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.softroce.kernel import Kernel

_APPEND = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 selinux=0 apparmor=0"
_CPU = "max,-erms,-fsrm"
"""Without what makes the kernel copy by `rep movsb`, which is emulated byte by byte."""
_CLOCK = "tsc=reliable no_timer_check"


class Qemu:
    """Runs from construction to `kill`."""

    def __init__(
        self,
        kernel: Kernel,
        folder: Path,
        *,
        number: int,
        num_cpus: int,
        memory_mb: int,
        cables: Sequence[socket.socket],
    ) -> None:
        """`number` tells joined machines apart. `folder` is /lab in the machine; its console is
        written beside it. The other ends of `cables` belong to another machine."""
        self.console = folder.parent / f"{folder.name}.console"
        self._complaints = folder.parent / f"{folder.name}.qemu"
        self.agent, agent = socket.socketpair()
        self.hooks, hooks = socket.socketpair()
        monitor, theirs = socket.socketpair()
        argv = _hardware(kernel, folder, self.console, num_cpus, memory_mb)
        argv += ["-device", "virtio-serial-pci"]
        for name, end in (("agent", agent), ("hooks", hooks)):
            argv += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
            argv += ["-device", f"virtserialport,chardev={name},name=lab.{name}"]
        argv += ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}"]
        argv += ["-mon", "chardev=monitor,mode=control"]
        for index, cable in enumerate(cables):
            mac = f"52:54:00:6b:{number:02x}:{index:02x}"
            argv += ["-netdev", f"socket,id=cable{index},fd={cable.fileno()}"]
            argv += ["-device", f"virtio-net-pci,netdev=cable{index},mac={mac},romfile="]
        inherited = [agent, hooks, theirs, *cables]
        with self._complaints.open("wb") as complaints:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=[end.fileno() for end in inherited],
                start_new_session=True,
            )
        for end in inherited:
            end.close()
        self._monitor = monitor
        self._words = monitor.makefile("rb")
        self._lock = threading.Lock()
        self._greeted = False

    def tell(self, command: str, **arguments: Any) -> None:
        """One command of the monitor. Raises RuntimeError with its refusal."""
        with self._lock:
            if not self._greeted:
                self._answer("QMP")
                self._ask("qmp_capabilities", {})
                self._greeted = True
            self._ask(command, arguments)

    def kill(self) -> None:
        """The power is gone."""
        self.process.kill()
        self.process.wait()
        for end in (self._words, self._monitor, self.agent, self.hooks):
            end.close()

    def last_words(self) -> str:
        """The end of what the kernel and QEMU wrote."""
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in (self.console, self._complaints)
            if path.exists()
        ]
        return "".join(texts)[-3000:]

    def _ask(self, command: str, arguments: dict[str, Any]) -> None:
        request = {"execute": command, "arguments": arguments}
        self._monitor.sendall(json.dumps(request).encode() + b"\n")
        self._answer("return")

    def _answer(self, key: str) -> None:
        while line := self._words.readline():
            said = json.loads(line)
            if "error" in said:
                raise RuntimeError(f"QEMU: {said['error'].get('desc')}")
            if key in said:
                return
        raise RuntimeError("QEMU ended")


def _hardware(
    kernel: Kernel, folder: Path, console: Path, num_cpus: int, memory_mb: int
) -> list[str]:
    accel = os.environ.get("SOFTROCE_ACCEL") or "tcg,thread=multi"
    root = "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
    return [
        "qemu-system-x86_64",
        *("-accel", accel, "-cpu", _CPU, "-M", "q35"),
        *("-smp", str(num_cpus), "-m", str(memory_mb)),
        *("-nodefaults", "-no-user-config", "-nographic"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initrd)),
        *("-append", f"{_APPEND} {_CLOCK}"),
        *("-serial", f"file:{console}"),
        *("-fsdev", root, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
        *("-fsdev", f"local,id=lab,path={folder},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=lab,mount_tag=lab"),
        *("-device", "virtio-rng-pci"),
    ]
