"""What lines mean: both forms, their defaults, and what is normalised on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdbatch.formats import Line, ParsedRequest, parse_line, parse_request
from pdbatch.sampling import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def accepted(line: Any) -> ParsedRequest:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    found = parse_line(Line(number=3, data=data, size_bytes=len(data)), 2)
    assert isinstance(found, ParsedRequest), found
    return found


def chat(**fields: Any) -> ParsedRequest:
    return accepted({"custom_id": "a", "url": CHAT, "body": {"messages": USER, **fields}})


def completion(**fields: Any) -> ParsedRequest:
    return accepted({"custom_id": "a", "url": COMPLETIONS, "body": {"prompt": "x", **fields}})


@pytest.mark.parametrize(
    ("line", "max_tokens"),
    [
        ({"url": CHAT, "body": {"messages": USER}}, None),
        ({"url": COMPLETIONS, "body": {"prompt": "x"}}, 16),
        ({"url": COMPLETIONS, "body": {"prompt": "x", "min_tokens": 20}}, 20),
        ({"messages": USER}, None),
        ({"prompt": "x"}, 256),
        ("x", 256),
    ],
)
def test_default_max_tokens(line: Any, max_tokens: int | None) -> None:
    assert accepted(line).spec.sampling.max_tokens == max_tokens


def test_an_openai_line() -> None:
    found = accepted(
        {
            "custom_id": "mine",
            "method": "post",
            "url": CHAT,
            "body": {"model": "m", "messages": USER, "max_completion_tokens": 5, "seed": 1},
        }
    )
    assert (found.index, found.line, found.custom_id, found.model) == (2, 3, "mine", "m")
    assert (found.spec.endpoint, found.spec.form) == (CHAT, "openai")
    assert found.spec.sampling == SamplingParams(max_tokens=5, seed=1)


def test_plain_lines() -> None:
    found = accepted({"id": 7, "prompt": [1, 2, 3], "top_k": 5, "model": "m"})
    assert (found.custom_id, found.model, found.spec.form) == ("7", "m", "plain")
    assert (found.spec.prompt_token_ids, found.spec.sampling.top_k) == ((1, 2, 3), 5)
    assert accepted("word").spec.prompt == "word"
    assert accepted("word").custom_id == "line-3"
    assert accepted({"custom_id": "c", "messages": USER}).custom_id == "c"
    assert accepted({"prompt": "x", "stop": "body"}).spec.sampling.stop == ("body",)


def test_log_probabilities_in_each_form() -> None:
    assert chat(logprobs=True).spec.sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).spec.sampling.logprobs == 4
    assert chat(logprobs=False).spec.sampling.logprobs is None
    assert chat(logprobs=False, top_logprobs=0).spec.sampling.logprobs is None
    assert completion(logprobs=4).spec.sampling.logprobs == 4
    assert completion(logprobs=0).spec.sampling.logprobs == 0
    assert accepted({"prompt": "x", "logprobs": True}).spec.sampling.logprobs == 0
    assert accepted({"messages": USER, "logprobs": 3}).spec.sampling.logprobs == 3


def test_stop_and_logit_bias() -> None:
    assert chat(stop="a").spec.sampling.stop == ("a",)
    assert chat(stop=["a", "b"]).spec.sampling.stop == ("a", "b")
    assert chat(stop=[]).spec.sampling.stop == ()
    assert chat(logit_bias={"50256": -100}).spec.sampling.logit_bias == {50256: -100.0}
    found = parse_request({"prompt": "x", "logit_bias": {50256: -100}})  # a key as Python has it
    assert isinstance(found, ParsedRequest)
    assert found.spec.sampling.logit_bias == {50256: -100.0}


def test_null_is_absent() -> None:
    fields = dict.fromkeys(("temperature", "n", "stop", "logprobs", "tools", "seed"))
    assert chat(**fields).spec == chat().spec


def test_fields_without_effect() -> None:
    found = chat(
        user="u", metadata={"a": "b"}, store=True, service_tier="flex", stream=False, tools=[]
    )
    assert found.spec == chat().spec


def test_messages() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {}}]}
    answer = {"role": "tool", "content": "4", "tool_call_id": "c"}
    found = chat(messages=[{"role": "user", "content": parts}, call, answer]).spec.messages
    assert found == [{"role": "user", "content": "one\ntwo"}, call, answer]


def test_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert chat(tools=tools).spec.tools == tools
    assert chat(tools=tools, tool_choice="auto").spec.tools == tools
    assert chat(tools=tools, tool_choice="none").spec.tools is None


def test_text_is_kept_as_it_is() -> None:
    for text in ("a\0b", "\u2028", "😀", "مرحبا", "\r\n", "\ufeff"):
        assert accepted({"prompt": text}).spec.prompt == text
    assert accepted(b'"\\ud83d\\ude00"').spec.prompt == "😀"


def test_of_equal_keys_the_last_counts() -> None:
    assert accepted(b'{"prompt": "a", "prompt": "b"}').spec.prompt == "b"


def test_the_users_dict_is_left_alone() -> None:
    request = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}
    before = json.dumps(request)
    assert isinstance(parse_request(request), ParsedRequest)
    assert json.dumps(request) == before
