"""Two machines: they reach each other, over the network and by RDMA; tests that need both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.softroce import inner as inner_tests
from tests.softroce.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
Pair = tuple[Machine, Machine]


@pytest.mark.parametrize(("device", "address"), [("rxe0", "192.0.2.1"), ("rxe1", "198.51.100.1")])
def test_each_device_reads_the_others_memory(pair: Pair, device: str, address: str) -> None:
    one, two = pair
    words = ["ib_read_bw", "-d", device, "-x", "1", "-s", "65536", "-n", "20", "-F"]
    server = one.start(words)
    assert "waiting" in _until(server.line, "waiting").lower()
    done = two.run([*words, address], 60)
    assert done.returncode == 0 and " 65536 " in done.stdout, done.stdout
    assert server.wait(60) == 0


def _until(line: Callable[[float], str], word: str) -> str:
    while word not in (said := line(60)).lower():
        pass
    return said


@pytest.mark.parametrize("path", inner_tests.joined(), ids=lambda path: path.stem)
def test_inside(pair: Pair, inner: Callable[..., None], path: Path) -> None:
    inner(pair[0], path)
