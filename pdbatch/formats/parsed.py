"""What reading an input yields: a line, and from it either a request or a reject.

A `Line` becomes exactly one `ParsedRequest` or one `Reject`, never both and never neither.
`index` counts requests (blank lines have none), `line` counts lines of the file from 1.
"""

from __future__ import annotations

import msgspec

from pdbatch.ids import RequestIndex
from pdbatch.request import RequestError, RequestSpec

DEFAULT_MAX_LINE_BYTES = 16 * 2**20


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line that is not blank, without its line end and without a byte order mark."""

    number: int
    """1-based; blank lines are counted too."""
    data: bytes
    """The whole line, or the first bytes of one that is too long."""
    size_bytes: int
    """Bytes of the whole line, also where `data` holds only its beginning."""
    too_long: bool = False
    """The line is above the limit and was skipped."""


class ParsedRequest(msgspec.Struct, frozen=True):
    """A request that is well formed; whether it fits the model shows later."""

    index: RequestIndex
    line: int
    custom_id: str
    """The user's, or `line-<line>` where there is none."""
    model: str | None
    """The line's own model, where it names one."""
    spec: RequestSpec


class Reject(msgspec.Struct, frozen=True):
    """A line that holds no request we can run, and why."""

    index: RequestIndex
    line: int
    custom_id: str
    """The user's where it could be read, else `line-<line>`."""
    error: RequestError
    """Status 400, with the line, the field where there is one, and the remedy."""


Parsed = ParsedRequest | Reject
