"""Lines out of streams: line ends, marks, blank and endless lines, names, sources."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdbatch.errors import InputError
from pdbatch.formats import Line, ParsedRequest, Reject, parse_line, read_lines, read_requests


class Endless(io.RawIOBase):
    """`size_bytes` of one byte without a line end, then `tail`; never in memory at once."""

    def __init__(self, size_bytes: int, tail: bytes) -> None:
        self._left_bytes, self._tail = size_bytes, io.BytesIO(tail)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left_bytes:
            return self._tail.readinto(buffer)
        count = min(len(buffer), self._left_bytes)
        buffer[:count] = b"[" * count
        self._left_bytes -= count
        return count


def lines(data: bytes, max_line_bytes: int = 100) -> list[tuple[int, bytes]]:
    found = read_lines(io.BytesIO(data), max_line_bytes=max_line_bytes)
    return [(line.number, line.data) for line in found]


def test_line_ends_marks_and_blank_lines() -> None:
    data = b'\xef\xbb\xbf"a"\r\n\r\n \t\n"b"\n\n"c"'
    assert lines(data) == [(1, b'"a"'), (4, b'"b"'), (6, b'"c"')]
    assert lines(b"") == lines(b"\n\n") == lines(b"\xef\xbb\xbf\n") == []


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("size_bytes", [9, 10, 11, 12, 13, 14, 15, 16, 17, 40])
def test_the_limit_counts_the_line_without_its_end(
    mark: bytes, end: bytes, size_bytes: int
) -> None:
    stream = io.BytesIO(mark + b"x" * size_bytes + end + b"y" * size_bytes + end + b"z")
    for line in read_lines(stream, max_line_bytes=10):
        if line.data.startswith((b"x", b"y")) and end:
            assert line.too_long == (size_bytes > 10)
            if not line.too_long:
                assert line.size_bytes == len(line.data) == size_bytes
        assert not line.data.startswith(mark or b"none")


def test_a_line_of_100_mb_is_skipped_in_little_memory() -> None:
    stream = io.BufferedReader(Endless(100_000_000, b'\n"next"\n'))
    tracemalloc.start()
    first, second = read_requests(stream, max_line_bytes=2**20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(first, Reject) and first.error.code == "line_too_long"
    assert "100,000,000 bytes" in first.error.message and first.error.line == 1
    assert isinstance(second, ParsedRequest) and (second.index, second.line) == (1, 2)
    assert peak_bytes < 8 * 2**20


def test_a_long_line_keeps_its_name() -> None:
    data = b'{"custom_id": "mine", "body": {"prompt": "' + b"x" * 10_000
    (found,) = read_requests(io.BytesIO(data), max_line_bytes=1000)
    assert found.custom_id == "mine"


@pytest.mark.parametrize("data", [b"[" * 10**8, b'"' + b"x" * 10**8 + b'"'])
def test_100_mb_within_the_limit(data: bytes) -> None:
    found = parse_line(Line(number=1, data=data, size_bytes=len(data)), 0)
    assert isinstance(found, ParsedRequest) == (data[:1] == b'"')


def test_made_up_names_avoid_given_ones() -> None:
    data = b'{"prompt": "a", "id": "line-3"}\n"b"\n"c"\n{"prompt": "d", "id": "line-1"}\n'
    names = [each.custom_id for each in read_requests(io.BytesIO(data))]
    assert names == ["line-3", "line-2", "line-3-unnamed", "line-1"]
    twice = b'{"prompt": "a", "id": "line-2"}\n{"prompt": "b", "id": "line-2"}\n'
    assert [each.custom_id for each in read_requests(io.BytesIO(twice))] == ["line-2"] * 2


def test_sources(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'"a"\n{"prompt": "b"}\n')
    values = ["a", {"prompt": "b"}]
    with path.open("rb") as stream:
        found = list(read_requests(stream))
    assert found == list(read_requests(path)) == list(read_requests(str(path)))
    assert found == list(read_requests(values)) == list(read_requests(iter(values)))
    (long,) = read_requests(["x" * 100], max_line_bytes=50)
    assert isinstance(long, Reject) and long.error.code == "line_too_long"


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    for bad in (tmp_path / "none", tmp_path, "nul\0", {"prompt": "x"}, b"bytes", 5):
        with pytest.raises(InputError) as caught:
            read_requests(bad)  # type: ignore[arg-type]
        assert caught.value.remedy
    with pytest.raises(InputError, match="text"):
        list(read_requests(io.StringIO('"a"\n')))  # type: ignore[arg-type]


def test_reading_is_lazy() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield json.dumps({})

    found = read_requests(endless())
    assert [next(found).index for _ in range(3)] == [0, 1, 2]


def test_a_job_of_many_lines_takes_constant_memory() -> None:
    class Repeated(io.RawIOBase):
        def __init__(self) -> None:
            self.left = 20_000

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if not self.left:
                return 0
            self.left -= 1
            line = b'{"custom_id": "line-%d", "prompt": "x"}\n' % (10**6 - self.left)
            buffer[: len(line)] = line
            return len(line)

    tracemalloc.start()
    count = sum(isinstance(each, ParsedRequest) for each in read_requests(Repeated()))  # type: ignore[arg-type]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak_bytes < 6 * 2**20
