"""Real processes under the supervisor: restarts, back-off, signals, groups."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdbatch.local.child import ProcessSpec
from pdbatch.local.supervisor import CANNOT_RUN, Exit, Supervisor

DEADLINE_S = 30.0


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A supervisor with what it told."""

    def __init__(self, *specs: ProcessSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self.lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.exits: list[Exit] = []
        self.supervisor = Supervisor(
            specs,
            on_line=lambda name, line: self.lines.put((name, line)),
            on_exit=self.exits.append,
            clock=clock,
        )

    def line(self) -> tuple[str, str]:
        return self.lines.get(timeout=DEADLINE_S)

    def until_exits(self, number: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self.exits) < number:
            assert time.monotonic() < deadline, f"{len(self.exits)} exits, not {number}"
            self.supervisor.step()
            if len(self.exits) < number:
                self.supervisor.wait(1.0)


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*specs: ProcessSpec, clock: Callable[[], float] = time.monotonic) -> Stage:
        made.append(Stage(*specs, clock=clock))
        return made[-1]

    yield make
    for each in made:
        each.supervisor.stop(0)


def python(name: str, code: str, *, log: Path | None = None, last: bool = False) -> ProcessSpec:
    argv = (sys.executable, "-u", "-c", code)
    return ProcessSpec(name=name, argv=argv, env=os.environ, log=log, stops_last=last)


FOREVER = "import signal; print('up'); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up')\n" + (
    "while True: signal.pause()"
)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def until_dead(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.01)


def test_lines_come_with_the_name_of_their_process(stage: Callable[..., Stage]) -> None:
    s = stage(python("a", "print('eins')\nprint('zwei'); import signal; signal.pause()"))
    s.supervisor.start()
    assert [s.line(), s.line()] == [("a", "eins"), ("a", "zwei")]


def test_an_exit_is_followed_by_a_start_after_the_back_off(stage: Callable[..., Stage]) -> None:
    clock = Clock()
    s = stage(python("a", "print('up'); raise SystemExit(3)"), clock=clock)
    s.supervisor.start()
    for number, delay_s in enumerate((0.5, 1.0, 2.0), start=1):
        assert s.line() == ("a", "up")
        s.until_exits(number)
        assert s.exits[-1] == Exit("a", 3, 0.0, delay_s)
        assert s.supervisor.num_exits("a") == number
        clock.now += delay_s * 0.9
        assert s.supervisor.step() == pytest.approx(delay_s * 0.1)
        assert s.supervisor.pid("a") is None
        clock.now += delay_s * 0.1 + 1e-6
        s.supervisor.step()
        assert s.supervisor.pid("a") is not None


def test_a_long_life_resets_the_back_off(stage: Callable[..., Stage]) -> None:
    clock = Clock()
    s = stage(python("a", FOREVER), clock=clock)
    s.supervisor.start()
    for number in (1, 2):
        assert s.line() == ("a", "up")
        clock.now += 31
        os.kill(s.supervisor.pid("a") or 0, signal.SIGKILL)
        s.until_exits(number)
        assert s.exits[-1].code == -signal.SIGKILL
        assert s.exits[-1].restart_in_s == 0.5
        clock.now += 0.6
        s.supervisor.step()


def test_a_program_that_does_not_exist_is_an_exit(stage: Callable[..., Stage]) -> None:
    s = stage(ProcessSpec(name="a", argv=("/does/not/exist",), env={}))
    s.supervisor.start()
    assert s.exits[0].code == CANNOT_RUN
    assert "cannot be started" in s.line()[1]


def test_stop_asks_first_and_kills_at_the_deadline(stage: Callable[..., Stage]) -> None:
    gentle = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + FOREVER
    s = stage(python("gentle", gentle), python("stubborn", STUBBORN))
    s.supervisor.start()
    pids = [s.supervisor.pid(name) or 0 for name in ("gentle", "stubborn")]
    assert {s.line(), s.line()} == {("gentle", "up"), ("stubborn", "up")}
    assert s.supervisor.stop(0.3) == ["stubborn"]
    assert not any(alive(pid) for pid in pids)
    assert s.exits == []


def test_what_stops_last_outlives_the_others(stage: Callable[..., Stage], tmp_path: Path) -> None:
    witness = (
        "import os, signal, sys\nbase = {pid}\n"
        "def end(*_):\n  print('base lives:', os.path.exists(f'/proc/{{base}}'))\n  sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n" + FOREVER
    )
    s = stage(python("base", FOREVER, last=True))
    s.supervisor.start()
    assert s.line() == ("base", "up")
    s.supervisor.add(python("top", witness.format(pid=s.supervisor.pid("base"))))
    s.supervisor.step()
    assert s.line() == ("top", "up")
    assert s.supervisor.stop(DEADLINE_S) == []
    assert s.line() == ("top", "base lives: True")


WITH_CHILD = (
    "import subprocess, sys, signal\n"
    "p = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
    "print(p.pid)\nsignal.pause()"
)


def test_what_a_process_leaves_behind_is_killed(stage: Callable[..., Stage]) -> None:
    s = stage(python("a", WITH_CHILD))
    s.supervisor.start()
    grandchild = int(s.line()[1])
    assert alive(grandchild)
    os.kill(s.supervisor.pid("a") or 0, signal.SIGKILL)
    s.until_exits(1)
    until_dead(grandchild)


def test_children_have_groups_of_their_own(stage: Callable[..., Stage]) -> None:
    s = stage(python("a", FOREVER))
    s.supervisor.start()
    pid = s.supervisor.pid("a") or 0
    assert os.getpgid(pid) == pid != os.getpgrp()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_children_die_with_a_killed_supervisor() -> None:
    code = (
        "import os, sys\n"
        "from pdbatch.local.child import ProcessSpec\n"
        "from pdbatch.local.supervisor import Supervisor\n"
        "argv = (sys.executable, '-c', 'import signal; signal.pause()')\n"
        "s = Supervisor([ProcessSpec(name='a', argv=argv, env=os.environ)])\n"
        "s.start()\nprint(s.pid('a'), flush=True)\ns.run()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout
        pid = int(supervisor.stdout.readline())
        assert alive(pid)
        supervisor.kill()
    until_dead(pid)


def test_run_ends_when_a_signal_asks(stage: Callable[..., Stage]) -> None:
    s = stage(python("a", FOREVER))
    old = signal.signal(signal.SIGUSR1, lambda *_: s.supervisor.request_stop())
    try:
        s.supervisor.start()
        assert s.line() == ("a", "up")
        os.kill(os.getpid(), signal.SIGUSR1)
        s.supervisor.run()
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_logs_are_kept_and_the_tail_is_of_this_life(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "a.log"
    clock = Clock()
    code = f"n = len(open({str(log)!r}).readlines()); print('life', n); raise SystemExit(1)"
    s = stage(python("a", code, log=log), clock=clock)
    s.supervisor.start()
    s.until_exits(1)
    clock.now += 1
    s.supervisor.step()
    s.until_exits(2)
    assert log.read_text() == "life 0\nlife 1\n"
    assert s.supervisor.log_tail("a") == "life 1\n"
