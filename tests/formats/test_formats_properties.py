"""Whatever the bytes are: one request or one reject, with line, field, remedy; prints its seed."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbatch.formats import (
    Line,
    Parsed,
    ParsedRequest,
    Reject,
    decode_spec,
    encode_spec,
    error_line,
    parse_line,
    parse_request,
    read_requests,
)
from pdbatch.formats.fields import REFUSED, PlainLine
from pdbatch.request import RequestOutput, RequestSpec

checked = settings(print_blob=True, deadline=None, max_examples=300)

CODES = {"invalid_request", "invalid_json", "line_too_long"}
WHOLE_LINE = ("the line ", "the request ", "a number in the line ", "byte ", "the file ")
FIELDS = [*PlainLine.__struct_fields__, *REFUSED, "url", "method", "body", "unknown", "max_tokns"]
ENDPOINTS = ["/v1/chat/completions", "/v1/completions"]

text = st.text(max_size=30)  # NULs and every plane, no lone surrogates
numbers = st.integers() | st.floats() | st.integers(10**18, 10**40)
scalars = st.none() | st.booleans() | numbers | text | st.sampled_from(ENDPOINTS)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)
token_ids = st.integers(0, 2**31 - 1)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": text},
        optional={"name": text, "tool_call_id": text},
    ),
    min_size=1,
    max_size=4,
)
sampling: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0.001, 1),
    "n": st.integers(1, 128),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "top_k": st.integers(-1, 1000),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 10),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(1, 10**6),
    "stop": st.lists(st.text(min_size=1, max_size=8), max_size=4),
    "stop_token_ids": st.lists(token_ids, max_size=4),
    "logit_bias": st.dictionaries(token_ids, st.floats(-100, 100), max_size=4),
}
options = st.fixed_dictionaries({}, optional=sampling)
custom_ids = st.text(min_size=1, max_size=40).filter(lambda name: "\0" not in name)
prompts = st.text(min_size=1, max_size=60) | st.lists(token_ids, min_size=1, max_size=8)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A valid request of either form, as a dict."""
    body: dict[str, Any] = dict(draw(options))
    chat = draw(st.booleans())
    body |= {"messages": draw(messages)} if chat else {"prompt": draw(prompts)}
    if draw(st.booleans()):
        body["model"] = draw(st.sampled_from(["m", "org/name", "smollm2-135m"]))
    if draw(st.booleans()):
        return body | draw(st.fixed_dictionaries({}, optional={"id": custom_ids}))
    url = ENDPOINTS[0] if chat else ENDPOINTS[1]
    return {"custom_id": draw(custom_ids), "method": "POST", "url": url, "body": body}


def parsed(data: bytes, number: int = 7) -> Parsed:
    found = parse_line(Line(number=number, data=data, size_bytes=len(data)), number - 1)
    check(found, number)
    return found


def check(found: Parsed, number: int) -> None:
    """What holds for every outcome."""
    assert isinstance(found, ParsedRequest) != isinstance(found, Reject)
    assert found.line == number
    assert 0 < len(found.custom_id) <= 512 and "\0" not in found.custom_id
    found.custom_id.encode()
    if isinstance(found, Reject):
        check_reject(found)
    else:
        check_spec(found.spec)


def check_reject(reject: Reject) -> None:
    error = reject.error
    assert error.line == reject.line and error.status == 400 and error.code in CODES
    fact, _, remedy = error.message.partition("; ")
    assert fact and len(remedy) > 3 and remedy.endswith(".")
    assert error.message.isprintable() and len(error.message) < 500
    if error.param is None:
        assert error.code != "invalid_request" or fact.startswith(WHOLE_LINE), error
    else:
        assert error.param and error.param.isprintable() and len(error.param) < 200
    output = RequestOutput(key=f"job_0:{reject.index}", error=error)
    line = msgspec.json.decode(error_line(reject.custom_id, None, None, output, 0.0))
    body = line["response"]["body"]["error"]
    assert line["custom_id"] == reject.custom_id and line["error"] is None
    assert (body["line"], body["param"], body["message"]) == (
        error.line,
        error.param,
        error.message,
    )


def check_spec(spec: RequestSpec) -> None:
    given = [spec.prompt, spec.prompt_token_ids, spec.messages]
    assert sum(each is not None for each in given) == 1
    assert (spec.messages is not None) == (spec.endpoint == "/v1/chat/completions")
    assert decode_spec(encode_spec(spec)) == spec
    packed = msgspec.msgpack.encode(spec)  # the engine's process gets it so
    assert msgspec.msgpack.decode(packed, type=RequestSpec) == spec


@checked
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    parsed(data)


@checked
@given(values)
def test_any_json(value: Any) -> None:
    parsed(json.dumps(value).encode())


@checked
@given(st.dictionaries(st.sampled_from(FIELDS) | text, values, max_size=6), st.booleans())
def test_any_object_with_known_fields(fields: dict[str, Any], inside: bool) -> None:
    line = {"custom_id": "a", "url": ENDPOINTS[len(fields) % 2], "body": fields}
    parsed(json.dumps(line if inside else fields).encode())


@checked
@given(requests(), st.data())
def test_broken_bytes_of_a_valid_line(request: dict[str, Any], data: st.DataObject) -> None:
    line = bytearray(json.dumps(request, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(line) - 1))
        line[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not line:
            break
    parsed(bytes(line))


@checked
@given(requests(), st.sampled_from(FIELDS), values)
def test_one_field_of_a_valid_line_is_anything(
    request: dict[str, Any], field: str, value: Any
) -> None:
    body = request.get("body", request)
    body[field] = value
    found = parsed(json.dumps(request).encode())
    if isinstance(found, Reject) and "NaN" not in json.dumps(request):
        assert found.error.param is not None or found.error.code == "invalid_json"


@checked
@given(requests())
def test_a_valid_request_comes_through_whole(request: dict[str, Any]) -> None:
    found = parsed(json.dumps(request).encode())
    assert isinstance(found, ParsedRequest), found
    body, spec = request.get("body", request), found.spec
    assert found.custom_id == request.get("custom_id", request.get("id", "line-7"))
    assert found.model == body.get("model")
    assert spec.form == ("openai" if "body" in request else "plain")
    assert spec.messages == body.get("messages")
    asked = body.get("prompt")
    got = list(spec.prompt_token_ids) if spec.prompt_token_ids is not None else spec.prompt
    assert got == asked
    for name in sampling.keys() & body.keys():
        value = getattr(spec.sampling, name)
        assert (list(value) if isinstance(value, tuple) else value) == body[name]


@checked
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, values)) | requests() | text)
def test_python_values_and_lines_are_read_alike(value: dict[str, Any] | str) -> None:
    found = parse_request(value, 6)
    check(found, 7)
    try:
        data = json.dumps(value, allow_nan=False).encode()
    except ValueError:
        assert isinstance(found, Reject)
    else:
        assert found == parsed(data)


@checked
@given(st.lists(st.binary(max_size=40) | requests().map(lambda r: json.dumps(r).encode())))
def test_a_file_gives_one_outcome_for_each_line_that_is_not_blank(lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    found = list(read_requests(io.BytesIO(data), max_line_bytes=200))
    raw = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    filled = [i + 1 for i, line in enumerate(raw) if line.strip()]
    assert [each.line for each in found] == filled
    assert [each.index for each in found] == list(range(len(filled)))
    for each in found:
        check(each, each.line)
        too_long = len(raw[each.line - 1].removesuffix(b"\r")) > 200
        assert too_long == (isinstance(each, Reject) and each.error.code == "line_too_long")
