"""What is wrong with a line, in the user's words: the field, the fact, the remedy.

Everything in this package that finds a line wrong raises `Problem`; `parse` turns it into a
`Reject`. Messages never quote more than a few dozen characters of the user's text and hold no
control characters, so that they are safe in any database, terminal and log.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

import msgspec

from pdbatch.request import RequestError

_QUOTED_CHARS = 60
_EXPECTED = re.compile(r"Expected `(.+?)`, got `(.+?)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_PATH = re.compile(r"`\$(.*?)`\Z", re.DOTALL)
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_KINDS = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class Problem(Exception):
    """A line cannot become a request. `what` is the fact, `remedy` says what to do."""

    def __init__(
        self, what: str, remedy: str, *, param: str | None = None, code: str = "invalid_request"
    ) -> None:
        super().__init__(what)
        self.code = code
        self.param = param
        self.message = f"{what}; {remedy}."

    def error(self, line: int) -> RequestError:
        """The same as a row keeps it."""
        return RequestError(
            code=self.code, message=self.message, param=self.param, line=line, status=400
        )


def show(text: str) -> str:
    """`text` quoted, escaped and cut, fit for a message."""
    cut = text[:_QUOTED_CHARS]
    return repr(cut) + ("…" if len(text) > len(cut) else "")


def kind(value: object) -> str:
    """What `value` is, as users of JSON say it."""
    names = {str: "str", bool: "bool", int: "int", float: "float", list: "array", dict: "object"}
    return _KINDS[names.get(type(value), "null")] if value is not None else "null"


def unknown_field(name: str, known: Iterable[str], prefix: str) -> Problem:
    """An unknown field, with the nearest known one."""
    near = _nearest(name[:_QUOTED_CHARS], tuple(known))
    remedy = f"write {near} if that is meant, or leave it out" if near else "leave it out"
    safe = name[:_QUOTED_CHARS] if name.isprintable() and name else show(name)
    return Problem(f"the field {prefix}{safe} is unknown", remedy, param=prefix + safe)


@lru_cache(maxsize=256)
def _nearest(name: str, known: tuple[str, ...]) -> str | None:
    """Slow (0.2 ms), and a mistake is mostly the same in every line of a file."""
    near = difflib.get_close_matches(name, known, n=1)
    return near[0] if near else None


def wrong_type(path: str, expected: str, got: str) -> Problem:
    """`expected` and `got` as msgspec names them: `float | null`, `str`."""
    wanted = [_KINDS.get(e, e) for e in expected.split(" | ") if e != "null"] or ["null"]
    fact = _KINDS.get(got, got)
    if got == "float" and "float" not in expected:
        fact = "a number with a decimal point"
    return Problem(
        f"{path or 'the line'} is {fact}",
        f"give {' or '.join(wanted)}",
        param=path or None,
    )


def from_validation(exc: msgspec.ValidationError, prefix: str, known: Iterable[str]) -> Problem:
    """Translates msgspec's finding; `prefix` is `body.` or nothing."""
    text = str(exc)
    if unknown := _UNKNOWN.match(text):
        return unknown_field(unknown[1], known, prefix)
    found = _PATH.search(text)
    inner = found[1].lstrip(".").replace("[...]", "") if found else ""
    path = prefix + inner if inner else prefix.rstrip(".")
    if "`key` in" in text:
        return Problem(
            f"a key of {path} is no token id", "give token ids as keys: whole numbers", param=path
        )
    if types := _EXPECTED.search(text):
        return wrong_type(path, types[1], types[2])
    return Problem(
        f"a number in {path or 'the line'} is too large",
        "give a smaller number",
        param=path or None,
    )


def from_decoding(exc: Exception, data: bytes) -> Problem:
    """What keeps `data` from being JSON at all: syntax, encoding or nesting."""
    if isinstance(exc, RecursionError):
        return Problem("the line is nested too deeply", "send fewer levels of brackets")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as bad:
        what = f"byte {bad.start} of the line is not UTF-8"
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            what = "the file seems to be UTF-16"
        return Problem(what, "save the file as UTF-8", code="invalid_json")
    if _HALF_PAIR.search(data):
        remedy = r"write the character itself, or both halves as \ud83d\ude00"
        return Problem("the line holds half a surrogate pair", remedy, code="invalid_json")
    detail = str(exc).removeprefix("JSON is malformed: ").replace("Input data was", "the line is")
    return Problem(
        f"the line is no JSON ({detail})",
        "write one whole JSON object or string on each line",
        code="invalid_json",
    )
