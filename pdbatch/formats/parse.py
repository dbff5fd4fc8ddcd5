"""One line to one request or one reject. Nothing that a line can hold makes these raise.

    {"custom_id": …, "method": "POST", "url": …, "body": {…}}     the OpenAI form
    {"prompt": … | "messages": …, "id": …, sampling fields}       the plain form
    "a prompt"                                                    the plain form, shortest

Strings that cannot be UTF-8 (half a surrogate pair) are refused everywhere. A NUL is text like any
other in prompts and messages; in a custom_id or a model's name it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from pdbatch.formats.build import (
    CHAT,
    COMPLETIONS,
    DEFAULT_MAX_TOKENS,
    Form,
    build_spec,
    check_model,
    check_prompt,
    check_refused,
)
from pdbatch.formats.custom_ids import checked_id, rescued_id, usable_id
from pdbatch.formats.fields import Body, PlainLine, WideBody, WidePlainLine
from pdbatch.formats.parsed import DEFAULT_MAX_LINE_BYTES, Line, Parsed, ParsedRequest, Reject
from pdbatch.formats.problems import (
    Problem,
    from_decoding,
    from_validation,
    kind,
    show,
)
from pdbatch.ids import RequestIndex
from pdbatch.request import Endpoint, RequestSpec
from pdbatch.sampling import SamplingParams

_ENDPOINTS: dict[str, Endpoint] = {CHAT: CHAT, COMPLETIONS: COMPLETIONS}


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the OpenAI form; the body is decoded after it."""

    custom_id: str | None = None
    method: str | None = None
    url: str | None = None
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Probe(msgspec.Struct):
    """Looks at any object at all: is it of the OpenAI form?"""

    method: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    url: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_BARE_SAMPLING = SamplingParams(max_tokens=DEFAULT_MAX_TOKENS["plain"])
_BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_decode_any = msgspec.json.Decoder().decode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_probe = msgspec.json.Decoder(_Probe).decode
_decode_body = msgspec.json.Decoder(Body).decode
_decode_wide_body = msgspec.json.Decoder(WideBody).decode
_decode_plain = msgspec.json.Decoder(PlainLine).decode
_decode_wide_plain = msgspec.json.Decoder(WidePlainLine).decode


def parse_line(line: Line, index: int, made_up_id: str | None = None) -> Parsed:
    """The request in `line`, or why there is none. Raises nothing, whatever the bytes are.

    `made_up_id` is the custom_id of a line that gives none; without it that is `line-<number>`.
    """
    name = made_up_id or f"line-{line.number}"
    data = line.data
    try:
        if line.too_long:
            raise _too_long(line.size_bytes)
        try:
            custom_id, model, spec = _parse(data)
        except msgspec.ValidationError as bad:
            raise from_validation(bad, "", ()) from None
        except _BAD_JSON as bad:
            raise from_decoding(bad, data) from None
    except Problem as problem:
        return Reject(
            RequestIndex(index), line.number, rescued_id(data) or name, problem.error(line.number)
        )
    return ParsedRequest(RequestIndex(index), line.number, custom_id or name, model, spec)


def parse_request(
    value: str | Mapping[str, Any],
    index: int = 0,
    made_up_id: str | None = None,
    *,
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
) -> Parsed:
    """A prompt, or a mapping in either form, under the same rules as a line. Raises nothing.

    The line reported is `index + 1`.
    """
    number = index + 1
    try:
        data = _as_json(value)
    except Problem as problem:
        given = (value.get("custom_id") or value.get("id")) if isinstance(value, Mapping) else None
        name = usable_id(given) or made_up_id or f"line-{number}"
        return Reject(RequestIndex(index), number, name, problem.error(number))
    too_long = len(data) > max_line_bytes
    line = Line(number=number, data=data, size_bytes=len(data), too_long=too_long)
    return parse_line(line, index, made_up_id)


def _parse(data: bytes) -> tuple[str | None, str | None, RequestSpec]:
    """custom_id, model and request. Raises Problem and what decoding raises."""
    first = data.lstrip()[:1]
    if first == b"{":
        if b'"body"' in data or b'"url"' in data or b'"method"' in data:
            try:
                envelope = _decode_envelope(data)
            except msgspec.ValidationError as bad:
                if _has_envelope(data):
                    raise from_validation(bad, "", _Envelope.__struct_fields__) from None
            else:
                if envelope.body is not msgspec.UNSET or envelope.url or envelope.method:
                    return _parse_openai(envelope)
        return _parse_plain(data)
    value = _decode_any(data)
    if not isinstance(value, str):
        raise Problem(
            f"the line is {kind(value)}",
            "write an object with prompt or messages, or a string, on each line",
        )
    return None, None, _bare_prompt(value)


def _parse_openai(line: _Envelope) -> tuple[str | None, str | None, RequestSpec]:
    custom_id = checked_id(line.custom_id, "custom_id")
    if line.method is not None and line.method.upper() != "POST":
        raise Problem("method is not POST", "give POST", param="method")
    endpoint = _ENDPOINTS.get(line.url or "")
    if endpoint is None:
        raise _unknown_url(line.url)
    if line.body is msgspec.UNSET:
        raise Problem("body is missing", "give an object with the request's fields", param="body")
    raw = bytes(line.body)
    try:
        body = _decode_body(raw)
    except msgspec.ValidationError:
        body = _decoded_wide(raw, "openai")
    check_model(body.model, "body.model")
    if endpoint == CHAT and body.prompt is not None:
        raise Problem(
            f"body.prompt does not belong to {CHAT}",
            f"give messages, or set url to {COMPLETIONS}",
            param="body.prompt",
        )
    return custom_id, body.model, build_spec(body, endpoint, "openai")


def _parse_plain(data: bytes) -> tuple[str | None, str | None, RequestSpec]:
    try:
        line = _decode_plain(data)
    except msgspec.ValidationError:
        line = _decoded_wide(data, "plain")
    if line.id is not None and line.custom_id is not None:
        raise Problem("id and custom_id are both given", "give one of them", param="id")
    name = "id" if line.custom_id is None else "custom_id"
    custom_id = checked_id(line.id if line.custom_id is None else line.custom_id, name)
    check_model(line.model, "model")
    if line.prompt is not None and line.messages is not None:
        raise Problem("prompt and messages are both given", "give one of them", param="prompt")
    if line.prompt is None and line.messages is None:
        raise Problem("the line has no prompt", "give prompt or messages", param="prompt")
    endpoint = COMPLETIONS if line.messages is None else CHAT
    return custom_id, line.model, build_spec(line, endpoint, "plain")


def _decoded_wide(data: bytes, form: Form) -> Any:
    """Decodes what the narrow structs did not take; raises Problem, or returns it if harmless."""
    decode, struct = (
        (_decode_wide_body, WideBody) if form == "openai" else (_decode_wide_plain, WidePlainLine)
    )
    try:
        body: Any = decode(data)
    except msgspec.ValidationError as bad:
        prefix = "body." if form == "openai" else ""
        raise from_validation(bad, prefix, struct.__struct_fields__) from None
    check_refused(body, form)
    return body


def _bare_prompt(prompt: str) -> RequestSpec:
    check_prompt(prompt, "")
    return RequestSpec(prompt=prompt, sampling=_BARE_SAMPLING, form="plain")


def _has_envelope(data: bytes) -> bool:
    probe = _decode_probe(data)
    return not (probe.body is probe.url is probe.method is msgspec.UNSET)


def _unknown_url(url: str | None) -> Problem:
    known = f"give {CHAT} or {COMPLETIONS}"
    if not url:
        return Problem("url is missing", known, param="url")
    if url.rstrip("/").endswith("/embeddings"):
        return Problem("url asks for embeddings, which pdbatch does not make", known, param="url")
    return Problem(f"url is {show(url)}, which pdbatch does not know", known, param="url")


def _too_long(size_bytes: int) -> Problem:
    return Problem(
        f"the line has {size_bytes:,} bytes, more than the limit",
        "shorten it or raise the setting max_line_bytes",
        code="line_too_long",
    )


def _as_json(value: str | Mapping[str, Any]) -> bytes:
    """What a user would have written for it. Raises Problem."""
    if not isinstance(value, str | Mapping):
        raise Problem(
            f"the request is of type {type(value).__name__}",
            "give a string, or a dict with prompt or messages",
        )
    try:
        return json.dumps(
            value if isinstance(value, str) else dict(value), allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as bad:
        raise Problem(
            f"the request cannot be written as JSON ({show(str(bad))})",
            "give strings, finite numbers, lists and dicts alone",
            param=_unwritable(value, "") if isinstance(value, Mapping) else None,
        ) from None


def _unwritable(value: Mapping[Any, Any], prefix: str) -> str | None:
    """The path of the field that JSON cannot hold, as far as into the body."""
    for name, item in value.items():
        path = f"{prefix}{name}"
        if name == "body" and isinstance(item, Mapping):
            if inner := _unwritable(item, "body."):
                return inner
            continue
        try:
            json.dumps({name: item}, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return path if path.isprintable() and len(path) < 80 else None
    return None
