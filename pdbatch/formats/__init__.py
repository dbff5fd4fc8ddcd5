"""Lines of users' files to requests, and outcomes to lines. Knows nothing of stores or engines.

In:

    read_requests(source, *, max_line_bytes=16 MiB) -> Iterator[ParsedRequest | Reject]
        source: path (str, PathLike) | binary stream | iterable of str (a prompt) and dict
    read_lines(stream, *, max_line_bytes) -> Iterator[Line]
    parse_line(line: Line, index) -> ParsedRequest | Reject
    parse_request(value: str | Mapping, index=0) -> ParsedRequest | Reject
    encode_spec(spec) -> bytes, decode_spec(body) -> RequestSpec          the request's row

Out (each returns one line of JSONL, its newline included):

    success_line(custom_id, endpoint, model, output: RequestOutput, created_at: float) -> bytes
    error_line(custom_id, endpoint, model, output: RequestOutput, created_at: float) -> bytes
    encode_output(output) -> bytes, decode_output(body) -> RequestOutput  the result's row
"""

from __future__ import annotations

from pdbatch.formats.parsed import (
    DEFAULT_MAX_LINE_BYTES,
    Line,
    Parsed,
    ParsedRequest,
    Reject,
)

__all__ = [
    "DEFAULT_MAX_LINE_BYTES",
    "Line",
    "Parsed",
    "ParsedRequest",
    "Reject",
]
