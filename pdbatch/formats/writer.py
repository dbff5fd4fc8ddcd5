"""Outcomes as lines of the output file and of the error file, in the shape of an OpenAI batch.

Every function returns one line of JSONL with its newline. Ids are made from the request's key, so
that writing the same results twice gives the same bytes. The form of the input makes no difference.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

from pdbatch.formats.logprobs import chat_logprobs, completion_logprobs
from pdbatch.request import CompletionOutput, RequestError, RequestOutput, Usage

_encode = msgspec.json.Encoder().encode


def result_line(
    custom_id: str,
    endpoint: str | None,
    model: str | None,
    output: RequestOutput,
    created_at: float,
) -> tuple[bool, bytes]:
    """Whether the line belongs in the error file, and the line."""
    write = success_line if output.error is None else error_line
    return output.error is not None, write(custom_id, endpoint, model, output, created_at)


def success_line(
    custom_id: str,
    endpoint: str | None,
    model: str | None,
    output: RequestOutput,
    created_at: float,
) -> bytes:
    """A line of the output file. `created_at` is in epoch seconds."""
    tail = _id_tail(output)
    if endpoint == "/v1/chat/completions":
        kind, head, choice = "chat.completion", "chatcmpl-", _chat_choice
    else:
        kind, head, choice = "text_completion", "cmpl-", _completion_choice
    body = {
        "id": head + tail,
        "object": kind,
        "created": int(created_at),
        "model": model,
        "choices": [choice(each) for each in output.outputs],
        "usage": _usage(output.usage),
        "pdbatch": {
            "times": output.times,
            "transfer": output.transfer,
            "workers": {"prefill": output.prefill_worker, "decode": output.decode_worker},
        },
    }
    response = {"status_code": 200, "request_id": "req_" + tail, "body": body}
    return _line(tail, custom_id, response, None)


def error_line(
    custom_id: str,
    endpoint: str | None,
    model: str | None,
    output: RequestOutput,
    created_at: float,
) -> bytes:
    """A line of the error file; takes what `success_line` takes. `output.error` must be set."""
    error = output.error
    if error is None:
        raise ValueError(f"{output.key} has no error")
    tail = _id_tail(output)
    if error.status is None:
        return _line(tail, custom_id, None, {"code": error.code, "message": error.message})
    response = {
        "status_code": error.status,
        "request_id": "req_" + tail,
        "body": {"error": _error_body(error)},
    }
    return _line(tail, custom_id, response, None)


def _line(tail: str, custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": "batch_req_" + tail,
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return _encode(line) + b"\n"


def _id_tail(output: RequestOutput) -> str:
    return blake2b(output.key.encode(), digest_size=12).hexdigest()


def _error_body(error: RequestError) -> dict[str, Any]:
    body: dict[str, Any] = {
        "message": error.message,
        "type": "invalid_request_error" if error.status == 400 else "server_error",
        "param": error.param,
        "code": error.code,
    }
    if error.line is not None:
        body["line"] = error.line
    return body


def _chat_choice(output: CompletionOutput) -> dict[str, Any]:
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": chat_logprobs(output.logprobs),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _completion_choice(output: CompletionOutput) -> dict[str, Any]:
    return {
        "index": output.index,
        "text": output.text,
        "logprobs": completion_logprobs(output.logprobs, len(output.text)),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
