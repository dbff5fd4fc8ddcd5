"""The fields of a request's body: those we honour, those that change nothing, those we refuse.

`Body` has the first two kinds and decodes nearly every line. Only where it meets something else is
the line decoded again with `WideBody`, which has the refused ones too: their harmless values
(`"stream": false`) pass, others are refused by name. What even that does not know is unknown.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of either endpoint. `null` is the same as absent, as in the OpenAI API."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    # Accepted and without effect.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    stream_options: Any = None


class PlainLine(Body, forbid_unknown_fields=True, kw_only=True):
    """A whole line of the plain form: the body's fields, and a name."""

    id: str | int | None = None
    custom_id: str | int | None = None


class Refused(NamedTuple):
    """A field that asks for what we cannot do, unless its value is one of `harmless` or null."""

    harmless: tuple[Any, ...]
    remedy: str


_TEXT_ONLY = "leave it out; outputs are free text"
_NO_TEMPLATE = "leave it out; the model's own chat template is used"
REFUSED: dict[str, Refused] = {
    "stream": Refused((False,), "leave it out; a batch has no stream"),
    "response_format": Refused(({"type": "text"},), _TEXT_ONLY),
    "guided_json": Refused((), _TEXT_ONLY),
    "guided_regex": Refused((), _TEXT_ONLY),
    "guided_choice": Refused((), _TEXT_ONLY),
    "guided_grammar": Refused((), _TEXT_ONLY),
    "structured_outputs": Refused((), _TEXT_ONLY),
    "functions": Refused(([],), "give tools instead"),
    "function_call": Refused(("auto", "none"), "leave it out, and give tools instead of functions"),
    "parallel_tool_calls": Refused((True,), "leave it out"),
    "best_of": Refused((), "leave it out; n outputs are made and all are returned"),
    "echo": Refused((False,), "leave it out and put the prompt before the output yourself"),
    "suffix": Refused(("",), "leave it out"),
    "prompt_logprobs": Refused((), "leave it out; logprobs are given for outputs"),
    "use_beam_search": Refused((False,), "leave it out"),
    "modalities": Refused((["text"],), "leave it out; outputs are text"),
    "audio": Refused((), "leave it out; outputs are text"),
    "reasoning_effort": Refused(("none",), "leave it out"),
    "verbosity": Refused(("medium",), "leave it out"),
    "web_search_options": Refused((), "leave it out"),
    "skip_special_tokens": Refused((True,), "leave it out"),
    "include_stop_str_in_output": Refused((False,), "leave it out"),
    "add_generation_prompt": Refused((True,), _NO_TEMPLATE),
    "continue_final_message": Refused((False,), _NO_TEMPLATE),
    "chat_template": Refused((), _NO_TEMPLATE),
    "chat_template_kwargs": Refused(({},), _NO_TEMPLATE),
    "truncate_prompt_tokens": Refused((), "leave it out and shorten the prompt yourself"),
    "allowed_token_ids": Refused(([],), "leave it out, or use logit_bias"),
    "bad_words": Refused(([],), "leave it out, or use logit_bias"),
}

_refused_fields: list[tuple[str, Any, Any]] = [(name, Any, None) for name in REFUSED]
WideBody = msgspec.defstruct(
    "WideBody", _refused_fields, bases=(Body,), forbid_unknown_fields=True, kw_only=True
)
WidePlainLine = msgspec.defstruct(
    "WidePlainLine", _refused_fields, bases=(PlainLine,), forbid_unknown_fields=True, kw_only=True
)
