"""Lines of the output and error files: the shapes of the OpenAI API, the same bytes every time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdbatch.formats import decode_output, encode_output, error_line, result_line, success_line
from pdbatch.request import (
    CompletionOutput,
    KVTransfer,
    PositionLogprobs,
    RequestError,
    RequestOutput,
    StageTimes,
    TokenLogprob,
    Usage,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

POSITIONS = [
    PositionLogprobs(
        TokenLogprob(5, "Hé", -0.5), [TokenLogprob(5, "Hé", -0.5), TokenLogprob(6, "Ho", -1.0)]
    ),
    PositionLogprobs(
        TokenLogprob(7, "\ufffd", float("-inf")),
        [TokenLogprob(8, "a", -0.1), TokenLogprob(9, "\ufffd", -2.0)],
    ),
    PositionLogprobs(TokenLogprob(10, "STOP", -3.0), [TokenLogprob(8, "a", -0.1)]),
]


def output(logprobs: list[PositionLogprobs] | None = None) -> RequestOutput:
    return RequestOutput(
        key="job_0:4",
        outputs=[
            CompletionOutput(
                index=0,
                text="Hé\ufffd",
                token_ids=[5, 7, 10],
                finish_reason="stop",
                stop_reason="STOP",
                logprobs=logprobs,
            ),
            CompletionOutput(index=1, text="b", token_ids=[9], finish_reason="length"),
        ],
        usage=Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=8),
        times=StageTimes(prefill_s=0.25, decode_s=1.5),
        transfer=KVTransfer(transport="shm", num_bytes=640),
        prefill_worker="p@h#1",
        decode_worker="d@h#1",
    )


def failed(error: RequestError) -> RequestOutput:
    return RequestOutput(key="job_0:4", error=error)


def read(line: bytes) -> dict[str, Any]:
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    found: dict[str, Any] = msgspec.json.decode(line)
    assert list(found) == ["id", "custom_id", "response", "error"]
    assert found["id"].startswith("batch_req_") and found["custom_id"] == "mine\n"
    return found


def test_a_chat_completion() -> None:
    line = read(success_line("mine\n", CHAT, "m", output(), 1700000000.9))
    response = line["response"]
    assert line["error"] is None and response["status_code"] == 200
    assert response["request_id"].startswith("req_")
    body = response["body"]
    assert body.pop("id").startswith("chatcmpl-")
    choices = body.pop("choices")
    assert body == {
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 4,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
        "pdbatch": {
            "times": {"prefill_s": 0.25, "decode_s": 1.5},
            "transfer": {"transport": "shm", "num_bytes": 640},
            "workers": {"prefill": "p@h#1", "decode": "d@h#1"},
        },
    }
    assert choices[0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hé\ufffd", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": "STOP",
    }
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]


def test_a_text_completion() -> None:
    body = read(success_line("mine\n", COMPLETIONS, None, output(), 0.0))["response"]["body"]
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"][1] == {
        "index": 1,
        "text": "b",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }


def test_log_probabilities_of_chat() -> None:
    body = read(success_line("mine\n", CHAT, "m", output(POSITIONS), 0.0))["response"]["body"]
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    first, second, third = logprobs["content"]
    chosen = {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]}
    assert first == {
        **chosen,
        "top_logprobs": [chosen, {"token": "Ho", "logprob": -1.0, "bytes": [72, 111]}],
    }
    assert (second["logprob"], second["bytes"]) == (-9999.0, None)  # half a character
    assert third["token"] == "STOP"


def test_log_probabilities_of_completions() -> None:
    line = read(success_line("mine\n", COMPLETIONS, "m", output(POSITIONS), 0.0))
    assert line["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["Hé", "\ufffd", "STOP"],
        "token_logprobs": [-0.5, -9999.0, -3.0],
        "top_logprobs": [
            {"Hé": -0.5, "Ho": -1.0},
            {"a": -0.1, "\ufffd": -2.0},
            {"a": -0.1, "STOP": -3.0},
        ],
        "text_offset": [0, 2, 3],
    }
    bare = [PositionLogprobs(p.chosen, []) for p in POSITIONS]
    line = read(success_line("mine\n", COMPLETIONS, "m", output(bare), 0.0))
    assert line["response"]["body"]["choices"][0]["logprobs"]["top_logprobs"] is None


def test_a_bad_request() -> None:
    error = RequestError(code="invalid_request", message="No; do.", param="n", line=3, status=400)
    line = read(error_line("mine\n", None, None, failed(error), 0.0))
    assert line["error"] is None
    assert line["response"].pop("request_id").startswith("req_")
    assert line["response"] == {
        "status_code": 400,
        "body": {
            "error": {
                "message": "No; do.",
                "type": "invalid_request_error",
                "param": "n",
                "code": "invalid_request",
                "line": 3,
            }
        },
    }


@pytest.mark.parametrize("code", ["batch_failed", "batch_cancelled", "batch_expired"])
def test_a_failure_outside_http(code: str) -> None:
    line = read(
        error_line("mine\n", CHAT, "m", failed(RequestError(code=code, message="So.")), 0.0)
    )
    assert line["response"] is None
    assert line["error"] == {"code": code, "message": "So."}


def test_the_kind_of_line_follows_the_outcome() -> None:
    error = failed(RequestError(code="batch_failed", message="So."))
    assert result_line("mine\n", CHAT, "m", error, 0.0)[0]
    is_error, line = result_line("mine\n", CHAT, "m", output(), 0.0)
    assert not is_error and line == success_line("mine\n", CHAT, "m", output(), 0.0)
    with pytest.raises(ValueError, match="no error"):
        error_line("mine\n", CHAT, "m", output(), 0.0)


def test_ids_come_from_the_key_alone() -> None:
    first = success_line("mine\n", CHAT, "m", output(), 5.0)
    assert first == success_line("mine\n", CHAT, "m", output(), 5.0)
    other = msgspec.structs.replace(output(), key="job_0:5")
    assert read(first)["id"] != read(success_line("mine\n", CHAT, "m", other, 5.0))["id"]


def test_a_row_survives_its_way_through_the_store() -> None:
    row = output(POSITIONS[:1])
    assert decode_output(encode_output(row)) == row
