"""Inputs and outputs named on the command line; `-` is stdin or stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from pdbatch.errors import InputError, UsageError

if TYPE_CHECKING:
    from pdbatch.result import Result


@contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """The input as a binary stream. Raises InputError when it cannot be opened."""
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = Path(name).open("rb")  # noqa: SIM115
        stream.peek(1)
    except OSError as error:
        raise InputError(
            f"{name} cannot be read: {error.strerror or error}",
            remedy="Give a JSONL file, or - for stdin.",
        ) from error
    with stream:
        yield stream


def check_output(name: str) -> None:
    """Raises UsageError now, not after hours, when `name` cannot be written."""
    path = Path(name)
    if name == "-":
        return
    if path.is_dir():
        raise UsageError(f"{name} is a folder", remedy="Name a file.")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist", remedy="Make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{name} cannot be written", remedy="Choose another place.")


def write_lines(name: str, results: Iterable[Result], *, flush: bool = False) -> int:
    """Writes one line for each result; returns how many.

    A regular file appears whole, under its name, when all is written; with `flush` it
    grows line by line instead.
    """
    number = 0
    with _open_output(name, whole=not flush) as file:
        for result in results:
            file.write(result.line())
            number += 1
            if flush:
                file.flush()
    return number


def write_errors(name: str, results: Iterable[Result]) -> int:
    """As `write_lines`, but makes no file where there is nothing to write."""
    rows = iter(results)
    for first in rows:
        return write_lines(name, _with_first(first, rows))
    return 0


def _with_first(first: Result, rest: Iterator[Result]) -> Iterator[Result]:
    yield first
    yield from rest


def _open_output(name: str, *, whole: bool) -> Any:
    if name == "-":
        return _stdout()
    path = Path(name)
    if whole and (path.is_file() or not path.exists()) and not path.is_symlink():
        return _whole_file(path)
    return path.open("wb")


@contextmanager
def _stdout() -> Iterator[BinaryIO]:
    """Stdout; a reader that leaves (`| head`) is no error and ends the writing."""
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
