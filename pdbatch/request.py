"""A request as the store keeps it and the engine takes it, and what comes out of it.

These structs travel as msgpack between a worker and its engine, and as JSON in SQL.
Formats (`pdbatch.formats`) turn users' lines into `RequestSpec` and `RequestOutput` into lines.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pdbatch.sampling import SamplingParams

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
FinishReason = Literal["stop", "length"]


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a user asked for: exactly one of prompt, prompt_token_ids, messages."""

    endpoint: Endpoint = "/v1/completions"
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    """Handed to the chat template as it is."""
    sampling: SamplingParams = SamplingParams()
    form: Literal["openai", "plain"] = "openai"
    """The form of the input line; the output line has the form of an OpenAI batch in both."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of one token after temperature 1, before any truncation."""

    token_id: int
    token: str
    logprob: float


class PositionLogprobs(msgspec.Struct, frozen=True):
    """The chosen token and the likeliest others at one position, likeliest first."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of the `n` outputs of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or token id that ended it, where one did."""
    logprobs: list[PositionLogprobs] | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request over all its outputs."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was found, not computed."""


class StageTimes(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Seconds that a request spent in each stage; unknown stages are 0."""

    queued_s: float = 0.0
    """In an engine, before its first step."""
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    """From offered until its pull began: waiting for a decode worker."""
    transfer_s: float = 0.0
    """The bytes' own way, with the proof that they are the right ones."""
    decode_s: float = 0.0
    engine_s: float = 0.0
    """No stage: its share, by tokens, of the steps that it took part in. Over all requests of a
    job that is the time that engines worked for it."""


class KVTransfer(msgspec.Struct, frozen=True, kw_only=True):
    """How a request's KV came from its prefill worker."""

    transport: str
    num_bytes: int
    """Blocks that the decode worker had already are left out."""


class RequestError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request has no output."""

    code: str
    """`invalid_request`, `context_length_exceeded`, `line_too_long`, `invalid_json`,
    `duplicate_custom_id`, `out_of_memory`, `batch_failed`, `batch_cancelled`, `batch_expired`, …"""
    message: str
    """One sentence, with the remedy at its end."""
    param: str | None = None
    """The field that is wrong, as a path: `body.temperature`."""
    line: int | None = None
    """1-based line of the input, where the input has lines."""
    status: int | None = None
    """400 for a bad request; None for a failure outside HTTP."""


class RequestOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The one end of one request: outputs, or an error, never both."""

    key: str
    """`pdbatch.ids.RequestKey`"""
    outputs: list[CompletionOutput] = []
    usage: Usage = Usage()
    times: StageTimes = msgspec.field(default_factory=StageTimes)
    transfer: KVTransfer | None = None
    """None: no KV was moved."""
    error: RequestError | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    prompt_token_ids: list[int] | None = None
    """Only from `LLM.generate`; rows do not hold it."""
