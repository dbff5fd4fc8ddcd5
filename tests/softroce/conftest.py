"""Machines for these tests.

lab       what they are made of; where something is missing the tests are skipped with the
          reason, with CI=true they fail
machine   one for all tests of a module
pair      two joined ones for all tests of a module
inner     runs a file of tests in a machine and fails with what it said
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.softroce.inner import NUM_NICS, run_tests
from tests.softroce.kernel import LabUnavailable
from tests.softroce.lab import Lab
from tests.softroce.machine import Machine

collect_ignore = ["inside"]


@pytest.fixture(scope="session")
def lab() -> Lab:
    try:
        return Lab.prepare()
    except LabUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def machine(lab: Lab) -> Iterator[Machine]:
    with lab.machine(nics=NUM_NICS) as found:
        yield found


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[tuple[Machine, Machine]]:
    with lab.two_machines(nics=NUM_NICS) as found:
        yield found


@pytest.fixture
def inner(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def run(machine: Machine, path: Path, *arguments: str, timeout_s: float = 600) -> None:
        outcome = run_tests(machine, [str(path), *arguments], timeout_s)
        print(outcome.output)
        assert not outcome.num_failed, (
            f"{outcome.num_failed} failed in {path.name}:\n{outcome.output}"
        )
        assert outcome.num_passed, f"nothing ran in {path.name}:\n{outcome.output}"

    return run
