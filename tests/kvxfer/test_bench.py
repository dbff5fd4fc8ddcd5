"""`python -m kvxfer bench`: what it measures, what it prints, what it draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvxfer.bench.case import Case, size_of, size_text
from kvxfer.bench.limits import bytes_per_second
from kvxfer.bench.plot import svg
from kvxfer.bench.race import race, share
from kvxfer.bench.report import rows_of, table

FAKE_MOONCAKE = """
import ctypes, os
class TransferEngine:
    def initialize(self, *_): return 0
    def register_memory(self, address, size): return 0
    def get_rpc_port(self): return os.getpid()
    def batch_transfer_sync_read(self, session, here, there, sizes):
        for address, size in zip(here, sizes):
            ctypes.memset(address, {fill}, size)
        return 0
"""


def bench(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvxfer", "bench", "--rounds", "2", "--sizes", "256KiB"]
    return subprocess.run(
        [*command, "--blocks", "64KiB", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


def test_every_transport_of_the_host_beside_its_limit(tmp_path: Path) -> None:
    done = bench("--json", "--transport", "mem", "shm", "tcp", "--plot", str(tmp_path / "a.svg"))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {"mem", "shm", "tcp", "memcpy", "socket"}
    for name, limit in (("mem", "memcpy"), ("shm", "memcpy"), ("tcp", "socket")):
        assert rows[name]["limit"] == limit and rows[name]["of_limit"] > 0
        assert rows[name]["transfer_bytes"] == 1 << 18 and rows[name]["gb_per_s"] > 0
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    done = bench("--transport", "pigeon")
    assert done.returncode and "pigeon" in done.stderr and "mem, shm, tcp" in done.stderr
    done = bench("--transport", "shm", "--peer", "mooncake", "--peer-python", "/bin/false")
    assert done.returncode and "--peer-python" in done.stderr
    done = bench("--sizes", "1KiB")
    assert done.returncode and "no size is as large" in done.stderr
    done = bench("--blocks", "many")
    assert done.returncode and "is no size" in done.stderr


@pytest.mark.parametrize("fill", [7, 9])
def test_a_rival_takes_its_turns_and_its_bytes_are_looked_at(tmp_path: Path, fill: int) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    fake = FAKE_MOONCAKE.format(fill=fill)
    (tmp_path / "mooncake" / "engine.py").write_text(fake, encoding="utf-8")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    words = ("--json", "--transport", "tcp", "--peer", "mooncake")
    done = bench(*words, PYTHONPATH=path)
    if fill != 7:
        assert done.returncode and "other bytes came" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {"tcp", "socket", "mooncake"}
    assert rows["mooncake"]["kind"] == "rival" and rows["mooncake"]["ours_is_times"] > 0


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-m", "kvxfer"], capture_output=True, text=True)
    assert done.returncode and "bench" in done.stderr
    done = bench("--help")
    assert done.returncode == 0 and "--peer-python" in done.stdout


def test_sizes() -> None:
    assert [size_of(text) for text in ("64KiB", "64K", "1MiB", "2G", "7", "8 B")] == [
        *(1 << 16, 1 << 16, 1 << 20, 2 << 30, 7, 8)
    ]
    for bad in ("", "KiB", "0", "1.5M", "-1", "1TiB"):
        with pytest.raises(ValueError, match="is no size"):
            size_of(bad)
    assert [size_text(n) for n in (100, 368640, 1 << 20, 3 << 30)] == [
        *("100 B", "360 KiB", "1 MiB", "3 GiB")
    ]
    case = Case(1 << 20, 360 << 10, 50)
    assert (case.count, case.num_bytes) == (3, 1080 << 10)
    assert len(case.tables) == 32 and case.tables == Case(1 << 20, 360 << 10, 50).tables
    assert all(case.offset(turn) + case.num_bytes <= case.pool_bytes for turn in range(1000))


def test_turns_rotate_and_shares_are_within_rounds() -> None:
    called: list[tuple[str, int]] = []

    def entrant(name: str, seconds: float) -> object:
        def turn(number: int) -> float:
            called.append((name, number))
            return seconds * (1 + number)

        return turn

    times = race({"a": entrant("a", 1.0), "b": entrant("b", 2.0)}, 3, 2)  # type: ignore[dict-item]
    assert called == [
        *(("a", 0), ("a", 1), ("b", 0), ("b", 1)),
        *(("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)),
    ]
    assert times == {"a": [1, 2, 3], "b": [2, 4, 6]}
    assert share(times["a"], times["b"]) == 2


def test_a_limit_that_could_not_be_measured_is_left_empty() -> None:
    rows = rows_of(Case(1 << 20, 1 << 16, 2), {"rdma": [1e-3]}, {})
    assert rows[0].kind == "transport" and rows[0].of_limit is None
    assert "of ib_read_bw" not in table(rows)
    assert ET.fromstring(svg(rows)) is not None


def test_the_table_of_ib_read_bw() -> None:
    line = " 65536      1000             {}              {}		   0.022\n"
    head = " #bytes     #iterations    BW peak[{0}/sec]    BW average[{0}/sec]   MsgRate[Mpps]\n"
    assert bytes_per_second(head.format("MB") + line.format("0.00", "2000.00")) == 2000 * 2**20
    assert bytes_per_second(head.format("Gb") + line.format("8.1", "8.00")) == 1e9
    assert bytes_per_second("Couldn't connect to 127.0.0.1:18515") is None
