"""The names of requests: checked where given, made up where absent, rescued from broken lines."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pdbatch.formats.problems import Problem

MAX_CUSTOM_ID_CHARS = 512

_MOST_RESERVED = 100_000
_LEADING_ID = re.compile(rb'\s*\{\s*"(?:custom_)?id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,2048}")')


class _Named(msgspec.Struct):
    custom_id: Any = None
    id: Any = None


_decode_named = msgspec.json.Decoder(_Named).decode
_decode_string = msgspec.json.Decoder(str).decode


def checked_id(value: str | int | None, param: str) -> str | None:
    """The name as text, None where there is none. Raises Problem."""
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    if 0 < len(text) <= MAX_CUSTOM_ID_CHARS and "\0" not in text:
        return text
    raise Problem(
        f"{param} is empty, longer than {MAX_CUSTOM_ID_CHARS} characters or holds a NUL",
        "give a short name that no other line has",
        param=param,
    )


def rescued_id(data: bytes) -> str | None:
    """The user's name for a line that was rejected, where it can still be read.

    Of a line that is no JSON, or is cut off, only a name that stands first is found.
    """
    try:
        named = _decode_named(data)
        value = named.id if named.custom_id is None else named.custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if not (found := _LEADING_ID.match(data)):
            return None
        try:
            value = _decode_string(found[1])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
    return usable_id(value)


def usable_id(value: Any) -> str | None:
    """`value` as a name, None where it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    try:
        name = checked_id(value, "custom_id")
        return name if name and name.encode() else None
    except (Problem, ValueError):  # half a surrogate pair; too many digits
        return None


class MadeUpIds:
    """`line-<number>` for lines without a name, avoiding names that earlier lines were given.

    Remembers at most 100,000 given names of that form, and each only until its line is passed,
    so that memory stays constant. A later line that is given a name already made up is a duplicate.
    """

    def __init__(self) -> None:
        self._reserved: set[int] = set()

    def for_line(self, number: int) -> str:
        """The name that line `number` has if it gives none."""
        if number in self._reserved:
            self._reserved.discard(number)
            return f"line-{number}-unnamed"
        return f"line-{number}"

    def given(self, custom_id: str, number: int) -> None:
        """Line `number` was given this name: keep a later line from making it up."""
        if not custom_id.startswith("line-") or len(self._reserved) >= _MOST_RESERVED:
            return
        digits = custom_id[5:]
        if len(digits) < 19 and digits.isdecimal() and int(digits) > number:
            self._reserved.add(int(digits))
