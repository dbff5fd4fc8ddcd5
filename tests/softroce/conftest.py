"""Machines for these tests.

lab       what they are made of; where something is missing the tests are skipped with the
          reason, with CI=true they fail
machine   one, for whoever comes
joined    two, in which whole files of tests run, one after the other, while other tests run
          here: a machine keeps one core busy
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.softroce.inner import NUM_NICS, Outcome, run_tests
from tests.softroce.kernel import LabUnavailable
from tests.softroce.lab import Lab
from tests.softroce.machine import Machine

collect_ignore = ["inside"]


class Joined:
    """Two machines, booted for the first file."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._stack = ExitStack()
        self._machine: Machine | None = None
        self._pool = ThreadPoolExecutor(1, "joined")
        self._outcomes: dict[Path, Future[Outcome]] = {}
        self._lock = threading.Lock()

    def begin(self, path: Path) -> Future[Outcome]:
        """Run a file when those before it are done; once."""
        with self._lock:
            if path not in self._outcomes:
                self._outcomes[path] = self._pool.submit(self._run, path)
            return self._outcomes[path]

    def close(self) -> None:
        """A file that runs ends with its machine."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stack.close()
        self._pool.shutdown()

    def _run(self, path: Path) -> Outcome:
        if self._machine is None:
            self._machine, _ = self._stack.enter_context(self._lab.two_machines(nics=NUM_NICS))
        return run_tests(self._machine, [str(path)])


@pytest.fixture(scope="session")
def lab() -> Lab:
    try:
        return Lab.prepare()
    except LabUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def joined(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Joined]:
    """Begins at once with all files that were asked for, unless each worker would do so."""
    found = Joined(lab)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for item in request.session.items:
            if isinstance(item, pytest.Function) and "in_two_machines" in item.name:
                path = item.callspec.params["path"]
                assert isinstance(path, Path)
                found.begin(path)
    yield found
    found.close()


@pytest.fixture(scope="session")
def machine(lab: Lab, joined: Joined) -> Iterator[Machine]:
    with lab.machine(nics=NUM_NICS) as found:
        yield found
