"""The tests that run in machines: a test here for each file there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softroce import inner
from tests.softroce.conftest import Joined
from tests.softroce.inner import Outcome
from tests.softroce.machine import PROJECT, Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
_SUITES = "(TestShm or TestTcp) and not " + " and not ".join(
    ["leak", "comes_back", "dead", "dies", "stopped", "overlaps"]
)


def passed(path: Path, outcome: Outcome) -> None:
    """Show what it said; fail unless all was well."""
    print(outcome.output)
    if outcome.num_failed or not outcome.num_passed:
        counts = f"{outcome.num_failed} failed, {outcome.num_passed} passed"
        pytest.fail(f"{path.name}: {counts}\n{outcome.output}", pytrace=False)


def test_the_suites_of_shared_memory_and_tcp(machine: Machine) -> None:
    """They need no device: what fails here is the lab's fault, or emulation's. Without the tests
    that start processes, at four seconds each."""
    path = PROJECT / "tests/kvxfer/test_transports.py"
    passed(path, inner.run_tests(machine, [str(path), "-k", _SUITES]))


@pytest.mark.parametrize("path", inner.alone(), ids=lambda path: path.stem)
def test_in_one_machine(machine: Machine, path: Path) -> None:
    passed(path, inner.run_tests(machine, [str(path)]))


@pytest.mark.parametrize("path", inner.joined(), ids=lambda path: path.stem)
def test_in_two_machines(joined: Joined, path: Path) -> None:
    passed(path, joined.begin(path).result())
