"""Lines of users' files to requests, and outcomes to lines. Knows nothing of stores or engines.

In:

    read_requests(source, *, max_line_bytes=16 MiB) -> Iterator[ParsedRequest | Reject]
        source: path (str, PathLike) | binary stream | iterable of str (a prompt) and dict
    read_lines(stream, *, max_line_bytes) -> Iterator[Line]
    parse_line(line: Line, index) -> ParsedRequest | Reject
    parse_request(value: str | Mapping, index=0) -> ParsedRequest | Reject
    encode_spec(spec) -> bytes, decode_spec(body) -> RequestSpec          the request's row

Out (each returns one line of JSONL, its newline included):

    result_line(custom_id, endpoint, model, output, created_at) -> (is_error, line)
    success_line(custom_id, endpoint, model, output: RequestOutput, created_at: float) -> bytes
    error_line(custom_id, endpoint, model, output: RequestOutput, created_at: float) -> bytes
    encode_output(output) -> bytes, decode_output(body) -> RequestOutput  the result's row
"""

from __future__ import annotations

import msgspec

from pdbatch.formats.parse import parse_line, parse_request
from pdbatch.formats.parsed import (
    DEFAULT_MAX_LINE_BYTES,
    Line,
    Parsed,
    ParsedRequest,
    Reject,
)
from pdbatch.formats.reader import Source, read_lines, read_requests
from pdbatch.formats.writer import error_line, result_line, success_line
from pdbatch.request import RequestOutput, RequestSpec

encode_spec = msgspec.json.Encoder().encode
"""A RequestSpec as the request's row keeps it."""
decode_spec = msgspec.json.Decoder(RequestSpec).decode
encode_output = msgspec.json.Encoder().encode
"""A RequestOutput as the result's row keeps it."""
decode_output = msgspec.json.Decoder(RequestOutput).decode

__all__ = [
    "DEFAULT_MAX_LINE_BYTES",
    "Line",
    "Parsed",
    "ParsedRequest",
    "Reject",
    "Source",
    "decode_output",
    "decode_spec",
    "encode_output",
    "encode_spec",
    "error_line",
    "parse_line",
    "parse_request",
    "read_lines",
    "read_requests",
    "result_line",
    "success_line",
]
