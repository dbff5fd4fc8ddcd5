"""What the lab promises about a machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.softroce.lab import Lab
from tests.softroce.machine import PROJECT, Machine, MachineLost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_status_and_output_come_out(machine: Machine) -> None:
    done = machine.run("echo said; echo complained >&2; exit 42")
    assert (done.returncode, done.stdout) == (42, "said\ncomplained\n")
    assert machine.run(["no-such-program"]).returncode == 127
    assert machine.run("kill -9 $$").returncode == -9


def test_what_takes_too_long_is_killed_with_all_that_it_started(machine: Machine) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        machine.run("echo before; sleep 1000 & sleep 1000", 2)
    assert caught.value.output == "before\n"
    assert machine.run("pgrep -x sleep").stdout == ""


def test_what_is_written_stays_inside_but_for_its_folder(machine: Machine, tmp_path: Path) -> None:
    done = machine.run(f"touch {tmp_path}/inside {PROJECT}/inside && echo told > /lab/told")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "inside").exists() and not (PROJECT / "inside").exists()
    assert (machine.folder / "told").read_text() == "told\n"


def test_lines_are_heard_and_answered(machine: Machine) -> None:
    process = machine.start(["bash", "-c", "read -r x; echo got $x; exec sleep 1000"])
    process.say("this")
    assert process.line() == "got this"
    process.kill()
    assert process.wait(0) == -9


def test_the_kernels_devices(machine: Machine) -> None:
    said = machine.run(["rdma", "link"]).stdout
    assert [line.split()[1] for line in said.splitlines()] == ["rxe0/1", "rxe1/1"], said
    assert said.count("state ACTIVE") == 2, said


def test_pyverbs_of_the_system_in_the_projects_python(machine: Machine) -> None:
    code = "import pyverbs.device as d; print([x.name.decode() for x in d.get_device_list()])"
    done = machine.run([sys.executable, "-c", code])
    assert done.stdout == "['rxe0', 'rxe1']\n", done.stdout


def test_a_machine_that_ends_is_told_apart(lab: Lab) -> None:
    """And it needs no device."""
    with lab.machine(nics=0, memory_mb=512) as machine:
        assert machine.run("ls /sys/class/infiniband").returncode
        start = time.monotonic()
        with pytest.raises(MachineLost, match="so far:\nlast words"):
            machine.run("echo last words; sleep 1; echo o > /proc/sysrq-trigger; sleep 1000", 100)
        assert time.monotonic() - start < 60
        with pytest.raises(MachineLost):
            machine.run(["true"])
