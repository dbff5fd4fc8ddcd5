"""Tests that run in a machine: pytest there, its counts here.

    python -m tests.softroce.inner [--cpus 2] FILE … [-k EXPRESSION] [-x] …

boots what the files need and runs them; what is not an option of this command is pytest's. Files
named test_two_*.py run in the first of two joined machines, the others in a machine alone.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.softroce.kernel import LabUnavailable
from tests.softroce.lab import Lab, show
from tests.softroce.machine import PROJECT, Machine

INSIDE = Path(__file__).resolve().parent / "inside"
NUM_NICS = 2
"""Devices of each machine; a test that names none takes the first."""
_ENVIRON = {"KVCACHE_RDMA_NICS": "rxe0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_PYTEST = ("-m", "pytest", "-p", "pytest_timeout", "-p", "no:cacheprovider", "-o", "timeout=600")


class Outcome(NamedTuple):
    """Of one run of pytest."""

    num_passed: int
    num_skipped: int
    num_failed: int
    seconds: float
    output: str


def alone() -> list[Path]:
    """The files for one machine."""
    return sorted(set(INSIDE.glob("test_*.py")) - set(joined()))


def joined() -> list[Path]:
    """The files for two."""
    return sorted(INSIDE.glob("test_two_*.py"))


def run_tests(
    machine: Machine,
    arguments: Sequence[str],
    timeout_s: float = 600,
    hears: Callable[[str], object] = str,
) -> Outcome:
    """pytest with the arguments, in the machine. No conftest above the files' own folder is read:
    theirs load what takes long under emulation. Raises what `Machine.run` raises."""
    report = machine.folder / "report.xml"
    report.unlink(missing_ok=True)
    files = [
        Path(argument) for argument in arguments if argument.partition("::")[0].endswith(".py")
    ]
    words = [sys.executable, *_PYTEST, "--junitxml=/lab/report.xml"]
    words += [f"--confcutdir={files[0].parent}"] if files else []
    done = machine.run([*words, *arguments], timeout_s, cwd=PROJECT, environ=_ENVIRON, hears=hears)
    if not report.exists():
        return Outcome(0, 0, 1, 0.0, done.stdout)
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {key: int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors")}
    num_failed = count["failures"] + count["errors"]
    if done.returncode and not num_failed:
        num_failed = 1  # nothing collected, a wrong option
    num_passed = max(0, count["tests"] - count["skipped"] - num_failed)
    seconds = float(suite.get("time", 0))
    return Outcome(num_passed, count["skipped"], num_failed, seconds, done.stdout)


def main(argv: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.softroce.inner")
    parser.add_argument("--cpus", type=int, default=1, help="of each machine; 1")
    parser.add_argument("--seconds", type=float, default=1200, help="that it may take; 1200")
    args, arguments = parser.parse_known_args(argv)
    two = any(Path(argument).name.startswith("test_two_") for argument in arguments)
    try:
        lab = Lab.prepare()
    except LabUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    with ExitStack() as stack:
        if two:
            pair = lab.two_machines(nics=NUM_NICS, num_cpus=args.cpus)
            machine, _ = stack.enter_context(pair)
        else:
            machine = stack.enter_context(lab.machine(nics=NUM_NICS, num_cpus=args.cpus))
        outcome = run_tests(machine, arguments, args.seconds, show)
    return min(1, outcome.num_failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
