"""Reads an input one line at a time, whatever its size, and whatever is in it.

Memory is bounded by one line: a line above the limit is skipped in pieces and reported.
Blank lines are skipped (and counted), a byte order mark at the start and CRLF are taken off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from pdbatch.errors import InputError
from pdbatch.formats.custom_ids import MadeUpIds
from pdbatch.formats.parse import parse_line, parse_request
from pdbatch.formats.parsed import DEFAULT_MAX_LINE_BYTES, Line, Parsed

Source = str | os.PathLike[str] | BinaryIO | Iterable[str | Mapping[str, Any]]

_BOM = b"\xef\xbb\xbf"
_KEPT_BYTES = 4096
_SKIPPED_AT_ONCE_BYTES = 2**20


def read_lines(stream: BinaryIO, *, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of `stream` that are not blank. Raises InputError where it cannot be read."""
    number = 0
    room = max_line_bytes + 2  # CRLF
    while data := _read(stream, room + len(_BOM) if number == 0 else room):
        number += 1
        size_bytes, whole = len(data), True
        if data[-1] == 10:
            data = data[:-2] if data[-2:] == b"\r\n" else data[:-1]
        elif size_bytes >= room:
            data, size_bytes, whole = data[:_KEPT_BYTES], *_skip_line(stream, data)
        if number == 1 and data.startswith(_BOM):
            data = data[len(_BOM) :]
        if whole:
            size_bytes = len(data)
        if size_bytes > max_line_bytes:
            yield Line(number=number, data=data[:_KEPT_BYTES], size_bytes=size_bytes, too_long=True)
        elif data and not data.isspace():
            yield Line(number=number, data=data, size_bytes=size_bytes)


def read_requests(
    source: Source, *, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES
) -> Iterator[Parsed]:
    """Every request of a path, a binary stream, or an iterable of prompts (str) and dicts.

    Raises InputError: at once where the source cannot be opened or is of another type, while
    iterating where it cannot be read on.
    """
    if isinstance(source, str | os.PathLike):
        return _parsed_file(_opened(Path(source)), max_line_bytes)
    if hasattr(source, "readline"):
        return _parsed_lines(cast(BinaryIO, source), max_line_bytes)
    if isinstance(source, Mapping | bytes | bytearray) or not isinstance(source, Iterable):
        raise InputError(
            f"an input cannot be of type {type(source).__name__}",
            remedy="Give a path, a binary stream, or a list of strings and dicts.",
        )
    return _parsed_values(source, max_line_bytes)


def _parsed_file(stream: BinaryIO, max_line_bytes: int) -> Iterator[Parsed]:
    with stream:
        yield from _parsed_lines(stream, max_line_bytes)


def _parsed_lines(stream: BinaryIO, max_line_bytes: int) -> Iterator[Parsed]:
    names = MadeUpIds()
    for index, line in enumerate(read_lines(stream, max_line_bytes=max_line_bytes)):
        made_up = names.for_line(line.number)
        parsed = parse_line(line, index, made_up)
        if parsed.custom_id is not made_up:
            names.given(parsed.custom_id, line.number)
        yield parsed


def _parsed_values(
    values: Iterable[str | Mapping[str, Any]], max_line_bytes: int
) -> Iterator[Parsed]:
    names = MadeUpIds()
    for index, value in enumerate(values):
        made_up = names.for_line(index + 1)
        parsed = parse_request(value, index, made_up, max_line_bytes=max_line_bytes)
        if parsed.custom_id is not made_up:
            names.given(parsed.custom_id, index + 1)
        yield parsed


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=2**20)
    except (OSError, ValueError) as bad:  # ValueError: a NUL in the path
        raise InputError(
            f"cannot read {str(path)!r}: {getattr(bad, 'strerror', None) or bad}",
            remedy="Check the path and its permissions.",
        ) from bad


def _read(stream: BinaryIO, most_bytes: int) -> bytes:
    try:
        data = stream.readline(most_bytes)
    except (OSError, EOFError) as bad:
        raise InputError(
            f"reading stopped: {bad}", remedy="Check the input and try again."
        ) from bad
    if not isinstance(data, bytes):
        raise InputError("the stream gives text", remedy="Open it in binary mode ('rb').")
    return data


def _skip_line(stream: BinaryIO, begun: bytes) -> tuple[int, bool]:
    """Reads to the end of the line; the bytes of the whole line, and False: it is not at hand."""
    size_bytes = len(begun)
    while piece := _read(stream, _SKIPPED_AT_ONCE_BYTES):
        size_bytes += len(piece)
        if piece[-1] == 10:
            return size_bytes - 1, False
    return size_bytes, False
