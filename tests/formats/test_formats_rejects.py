"""Each known way to be wrong: code, field and the words of the remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdbatch.formats import Line, Parsed, ParsedRequest, Reject, parse_line, parse_request
from pdbatch.formats.fields import REFUSED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def parsed(data: bytes) -> Parsed:
    return parse_line(Line(number=3, data=data, size_bytes=len(data)), 2)


def rejected(data: bytes) -> Reject:
    found = parsed(data)
    assert isinstance(found, Reject), found
    assert found.error.line == 3 and found.error.status == 400
    return found


def openai(body: Any, url: str = CHAT) -> bytes:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()


CHAT_BODIES = [
    ({"temperature": "hot"}, "temperature", "give a number"),
    ({"temperature": 200}, "temperature", "change body.temperature"),
    ({"temperature": True}, "temperature", "give a number"),
    ({"top_p": 0}, "top_p", "change body.top_p"),
    ({"max_tokens": 0}, "max_tokens", "change body.max_tokens"),
    ({"max_tokens": 10**300}, "max_tokens", "change body.max_tokens"),
    ({"max_tokens": 8.0}, "max_tokens", "give a whole number"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "change body.max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "one of them"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "change body.min_tokens"),
    ({"n": 1000}, "n", "change body.n"),
    ({"n": 2, "best_of": 3}, "best_of", "n outputs"),
    ({"seed": 1.5}, "seed", "give a whole number"),
    ({"seed": 2**63}, "seed", "change body.seed"),
    ({"stop": ["a", 1]}, "stop[1]", "give a string"),
    ({"stop": [""]}, "stop", "change body.stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids as keys"),
    ({"logit_bias": {"-5": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "give a number"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "change body.logit_bias"),
    ({"logprobs": 5}, "logprobs", "logprobs: true and top_logprobs: 5"),
    ({"top_logprobs": 5}, "top_logprobs", "logprobs: true with it"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "change body.top_logprobs"),
    ({"model": ""}, "model", "a model's name"),
    ({"model": 5}, "model", "give a string"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": None}, "messages", "give messages"),
    ({"messages": "hi"}, "messages", "give a list"),
    ({"messages": ["hi"]}, "messages[0]", "give an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "system, user, assistant"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role", "system, user"),
    ({"messages": [*USER, {"role": "user"}]}, "messages[1].content", "give a string"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text parts"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "give a string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "type text alone",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "give a string",
    ),
    ({"messages": [{"role": "user", "content": "x", "big": 2**64}]}, "messages[0]", "as a string"),
    ({"prompt": "x"}, "prompt", f"set url to {COMPLETIONS}"),
    ({"tools": ["f"]}, "tools[0]", "give an object"),
    ({"tools": [{"a": 2**70}]}, "tools[0]", "as a string"),
    ({"tool_choice": "required"}, "tool_choice", "auto or none"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "auto or none"),
    ({"temprature": 1}, "temprature", "write temperature"),
    ({"zzzzzzzzzz": 1}, "zzzzzzzzzz", "leave it out"),
]


@pytest.mark.parametrize(("fields", "param", "remedy"), CHAT_BODIES)
def test_chat_bodies(fields: dict[str, Any], param: str, remedy: str) -> None:
    found = rejected(openai({"messages": USER, **fields}))
    assert (found.error.code, found.error.param) == ("invalid_request", f"body.{param}")
    assert remedy in found.error.message.partition("; ")[2]
    assert found.custom_id == "a"


@pytest.mark.parametrize(
    ("fields", "param", "remedy"),
    [
        ({}, "prompt", "a string or a list of token ids"),
        ({"prompt": ""}, "prompt", "a string or a list of token ids"),
        ({"prompt": 5}, "prompt", "a string or a list"),
        ({"prompt": []}, "prompt", "at least one token id"),
        ({"prompt": ["a", "b"]}, "prompt", "one line for each prompt"),
        ({"prompt": [[1], [2]]}, "prompt", "one line for each prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]", "whole numbers"),
        ({"prompt": [1, True]}, "prompt[1]", "whole numbers"),
        ({"prompt": [1, -2]}, "prompt[1]", "whole numbers"),
        ({"prompt": [2**31]}, "prompt[0]", "whole numbers"),
        ({"prompt": "x", "messages": USER}, "messages", f"set url to {CHAT}"),
        ({"prompt": "x", "tools": [{}]}, "tools", f"set url to {CHAT}"),
        ({"prompt": "x", "logprobs": True}, "logprobs", "logprobs: 5"),
        ({"prompt": "x", "top_logprobs": 2}, "top_logprobs", "logprobs: 5"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "change body.logprobs"),
        ({"prompt": "x", "echo": True}, "echo", "leave it out"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "leave it out"),
    ],
)
def test_completion_bodies(fields: dict[str, Any], param: str, remedy: str) -> None:
    error = rejected(openai(fields, COMPLETIONS)).error
    assert error.param == f"body.{param}" and remedy in error.message.partition("; ")[2]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields_are_named_and_their_harmless_values_pass(name: str) -> None:
    error = rejected(openai({"messages": USER, name: {"asks": "much"}})).error
    assert error.param == f"body.{name}" and REFUSED[name].remedy in error.message
    for value in (None, *REFUSED[name].harmless):
        assert isinstance(parsed(openai({"messages": USER, name: value})), ParsedRequest)


@pytest.mark.parametrize(
    ("change", "param", "remedy", "custom_id"),
    [
        ({"custom_id": 5}, "custom_id", "give a string", "5"),
        ({"custom_id": ""}, "custom_id", "short name", "line-3"),
        ({"custom_id": "a\0"}, "custom_id", "short name", "line-3"),
        ({"custom_id": "a" * 513}, "custom_id", "short name", "line-3"),
        ({"method": "GET"}, "method", "give POST", "a"),
        ({"url": None}, "url", CHAT, "a"),
        ({"url": "/v1/embeddings"}, "url", COMPLETIONS, "a"),
        ({"url": "/v1/other"}, "url", CHAT, "a"),
        ({"body": None}, "body", "give an object", "a"),
        ({"body": "hi"}, "body", "give an object", "a"),
        ({"prompt": "hi"}, "prompt", "leave it out", "a"),
        ({"bdy": {}}, "bdy", "write body", "a"),
    ],
)
def test_the_envelope(change: dict[str, Any], param: str, remedy: str, custom_id: str) -> None:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": USER}}
    found = rejected(json.dumps(line | change).encode())
    assert (found.error.param, found.custom_id) == (param, custom_id)
    assert remedy in found.error.message.partition("; ")[2]


@pytest.mark.parametrize(
    ("line", "param", "remedy"),
    [
        ({}, "prompt", "prompt or messages"),
        ({"custom_id": "a", "url": CHAT}, "body", "give an object"),
        ({"prompt": "x", "messages": USER}, "prompt", "one of them"),
        ({"prompt": "x", "id": "a", "custom_id": "b"}, "id", "one of them"),
        ({"prompt": "x", "temperature": -1}, "temperature", "change temperature"),
        ({"prompt": "x", "stream": True}, "stream", "leave it out"),
        ({"promt": "x"}, "promt", "write prompt"),
        ({"prompt": "x", "logprobs": 2, "top_logprobs": 3}, "top_logprobs", "one of them"),
        ("", "prompt", "a string"),
        (5, None, "an object with prompt or messages"),
        ([1], None, "an object with prompt or messages"),
        (None, None, "an object with prompt or messages"),
    ],
)
def test_plain_lines(line: Any, param: str | None, remedy: str) -> None:
    error = rejected(json.dumps(line).encode()).error
    assert error.param == param and remedy in error.message.partition("; ")[2]


@pytest.mark.parametrize(
    ("data", "code", "custom_id", "fact"),
    [
        (b'{"custom_id": "q", "body": {', "invalid_json", "q", "truncated"),
        (b'{"id": "k", "prompt": "x"} x', "invalid_json", "k", "trailing"),
        (b'{"prompt": NaN}', "invalid_json", "line-3", "invalid character"),
        (b'{"prompt": "\xff"}', "invalid_json", "line-3", "byte 12"),
        (b'{"prompt": "\xed\xa0\x80"}', "invalid_json", "line-3", "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "invalid_json", "line-3", "half a surrogate pair"),
        (b'{"prompt": "\\udc00\\ud800"}', "invalid_json", "line-3", "half a surrogate pair"),
        (b'{"prompt": "\\ud83d\\ude00",}', "invalid_json", "line-3", "trailing comma"),
        (b'\xff\xfe{\x00"\x00', "invalid_json", "line-3", "UTF-16"),
        (b"\x00\x00\x00", "invalid_json", "line-3", "invalid character"),
        (b'{"prompt": "a\x00b"}', "invalid_json", "line-3", "invalid character"),
        (b"1e999", "invalid_request", "line-3", "too large"),
        (b'{"prompt": "x", "top_p": 1e999}', "invalid_request", "line-3", "top_p is too large"),
        (b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "invalid_request", "line-3", "too large"),
        (b"[" * 100_000, "invalid_request", "line-3", "nested too deeply"),
        (b'{"a":' * 100_000, "invalid_request", "line-3", "unknown"),
        (b'{"custom_id":"q","body":' + b"[" * 100_000, "invalid_request", "q", "too deeply"),
    ],
)
def test_broken_bytes(data: bytes, code: str, custom_id: str, fact: str) -> None:
    found = rejected(data)
    assert (found.error.code, found.custom_id) == (code, custom_id)
    assert fact in found.error.message


@pytest.mark.parametrize("levels", [31, 400, 900, 5_000, 100_000])
def test_nesting_inside_a_message_at_every_depth(levels: int) -> None:
    deep = b'{"messages":[{"role":"user","content":"x","z":' + b"[" * levels + b"]" * levels
    data = b'{"custom_id":"q","url":"/v1/chat/completions","body":' + deep + b"}]}}"
    if levels < 32:
        assert isinstance(parsed(data), ParsedRequest)
    else:
        assert "brackets" in rejected(data).error.message


def test_a_long_foreign_name_is_cut_and_escaped() -> None:
    error = rejected(json.dumps({"prompt": "x", "\x1b[31m" + "z" * 10_000: 1}).encode()).error
    assert error.message.isprintable() and len(error.message) < 250
    assert error.param is not None and error.param.isprintable()


def test_python_values_that_json_cannot_hold() -> None:
    loop: dict[str, Any] = {"prompt": "x", "custom_id": "mine"}
    loop["metadata"] = loop
    bad: list[tuple[Any, str | None]] = [
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"url": CHAT, "body": {"messages": USER, "top_p": float("inf")}}, "body.top_p"),
        ({"prompt": b"x"}, "prompt"),
        ({"prompt": "x", "n": 10**5000}, "n"),
        (loop, "metadata"),
        (None, None),
        (b"bytes", None),
    ]
    for value, param in bad:
        found = parse_request(value, 4)
        assert isinstance(found, Reject)
        assert (found.error.param, found.error.line, found.index) == (param, 5, 4)
    assert parse_request(loop).custom_id == "mine"
    assert isinstance(parse_request("half \ud800"), Reject)
