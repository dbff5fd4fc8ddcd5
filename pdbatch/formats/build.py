"""From a decoded body to a `RequestSpec`: which endpoint, which prompt, which sampling.

Where `max_tokens` is absent: chat runs up to the model's length in both forms; a prompt stops
after 16 tokens in the OpenAI form, as in OpenAI's API, and after 256 in the plain form.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Literal

from pdbatch.formats.fields import REFUSED, Body
from pdbatch.formats.messages import checked_messages, checked_tools
from pdbatch.formats.problems import Problem, kind
from pdbatch.request import Endpoint, RequestSpec
from pdbatch.sampling import SamplingParams

CHAT: Endpoint = "/v1/chat/completions"
COMPLETIONS: Endpoint = "/v1/completions"
DEFAULT_MAX_TOKENS = {"openai": 16, "plain": 256}
"""Of a prompt without `max_tokens`, by the form of its line; chat has no default."""
MAX_MODEL_CHARS = 256

Form = Literal["openai", "plain"]
_SAME_NAME = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)
_same = attrgetter(*_SAME_NAME)


def build_spec(body: Body, endpoint: Endpoint, form: Form) -> RequestSpec:
    """The request of a body that was decoded. Raises Problem."""
    prefix = "body." if form == "openai" else ""
    sampling = _sampling(body, endpoint, form, prefix)
    if endpoint == CHAT:
        if body.messages is None:
            raise Problem(
                f"{prefix}messages is missing", "give messages", param=f"{prefix}messages"
            )
        tools = body.tools
        if tools is not None or body.tool_choice is not None:
            tools = _tools(body, prefix)
        messages = checked_messages(body.messages, f"{prefix}messages")
        return RequestSpec(
            endpoint=CHAT, messages=messages, tools=tools, sampling=sampling, form=form
        )
    for name in ("messages", "tools"):
        if getattr(body, name):
            raise Problem(
                f"{prefix}{name} does not belong to {COMPLETIONS}",
                f"set url to {CHAT}" if form == "openai" else "give messages instead of prompt",
                param=prefix + name,
            )
    prompt = body.prompt
    if isinstance(prompt, list):
        ids = _token_ids(prompt, f"{prefix}prompt")
        return RequestSpec(endpoint=COMPLETIONS, prompt_token_ids=ids, sampling=sampling, form=form)
    check_prompt(prompt, prefix)
    return RequestSpec(endpoint=COMPLETIONS, prompt=prompt, sampling=sampling, form=form)


def check_prompt(prompt: str | None, prefix: str) -> None:
    """Raises Problem for no prompt and for an empty one."""
    if not prompt:
        raise Problem(
            f"{prefix}prompt is {'missing' if prompt is None else 'empty'}",
            "give a string or a list of token ids",
            param=f"{prefix}prompt",
        )


def check_model(model: str | None, param: str) -> None:
    """Raises Problem for a name that no model can have."""
    if model is None or (0 < len(model) <= MAX_MODEL_CHARS and model.isprintable()):
        return
    raise Problem(
        f"{param} is empty, longer than {MAX_MODEL_CHARS} characters or not printable",
        "give a model's name or leave it out",
        param=param,
    )


def check_refused(body: Body, form: Form) -> None:
    """Raises Problem for the first refused field of a wide body that asks for something."""
    prefix = "body." if form == "openai" else ""
    for name, refused in REFUSED.items():
        value = getattr(body, name)
        if value is None or value in refused.harmless:
            continue
        if name == "best_of" and value == (body.n or 1):
            continue
        raise Problem(
            f"{prefix}{name} asks for something that pdbatch does not do",
            refused.remedy,
            param=prefix + name,
        )


def _token_ids(prompt: list[Any], path: str) -> tuple[int, ...]:
    if not prompt:
        raise Problem(f"{path} is an empty list", "give at least one token id", param=path)
    if isinstance(prompt[0], str | list):
        raise Problem(f"{path} is a list of prompts", "write one line for each prompt", param=path)
    for i, token in enumerate(prompt):
        if type(token) is not int or not 0 <= token < 2**31:
            what = "no token id" if type(token) is int else kind(token)
            raise Problem(
                f"{path}[{i}] is {what}",
                "give token ids as whole numbers from 0",
                param=f"{path}[{i}]",
            )
    return tuple(prompt)


def _tools(body: Body, prefix: str) -> list[dict[str, Any]] | None:
    choice = body.tool_choice
    if choice not in (None, "auto", "none"):
        raise Problem(
            f"{prefix}tool_choice asks for a certain tool, which pdbatch cannot force",
            "give auto or none",
            param=f"{prefix}tool_choice",
        )
    if choice == "none" or body.tools is None:
        return None
    return checked_tools(body.tools, f"{prefix}tools")


def _sampling(body: Body, endpoint: Endpoint, form: Form, prefix: str) -> SamplingParams:
    fields: dict[str, Any] = {
        name: value
        for name, value in zip(_SAME_NAME, _same(body), strict=True)
        if value is not None
    }
    fields["max_tokens"] = _max_tokens(body, endpoint, form, prefix)
    if body.logprobs is not None or body.top_logprobs is not None:
        fields["logprobs"] = _logprobs(body, endpoint, form, prefix)
    if body.stop is not None:
        fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        _check_ids(body.stop_token_ids, f"{prefix}stop_token_ids")
        fields["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        _check_ids(body.logit_bias, f"{prefix}logit_bias")
        fields["logit_bias"] = body.logit_bias
    try:
        return SamplingParams(**fields)
    except ValueError as bad:
        raise _out_of_range(body, str(bad), endpoint, prefix) from None


def _out_of_range(body: Body, text: str, endpoint: Endpoint, prefix: str) -> Problem:
    """`text` begins with the sampling field's name; the user may have used another one."""
    name, _, rest = text.partition(" ")
    given = name
    if name == "max_tokens" and body.max_completion_tokens is not None:
        given = "max_completion_tokens"
    elif name == "logprobs" and body.top_logprobs is not None:
        given = "top_logprobs"
    path = prefix + given
    return Problem(f"{path} {rest[:120]}", f"change {path} or leave it out", param=path)


def _max_tokens(body: Body, endpoint: Endpoint, form: Form, prefix: str) -> int | None:
    given, other = body.max_completion_tokens, body.max_tokens
    if given is not None and other is not None and given != other:
        raise Problem(
            f"{prefix}max_tokens and {prefix}max_completion_tokens differ",
            "give one of them",
            param=f"{prefix}max_completion_tokens",
        )
    if given is None:
        given = other
    if given is None and endpoint == COMPLETIONS:
        return max(DEFAULT_MAX_TOKENS[form], body.min_tokens or 0)
    return given


def _logprobs(body: Body, endpoint: Endpoint, form: Form, prefix: str) -> int | None:
    """Chat: `logprobs: true, top_logprobs: 5`; completions: `logprobs: 5`; plain lines: either."""
    asked, top = body.logprobs, body.top_logprobs
    if form == "openai" and endpoint == CHAT and asked is not None and type(asked) is not bool:
        raise Problem(
            f"{prefix}logprobs is a number, which chat does not take",
            f"give logprobs: true and top_logprobs: {asked if 0 <= asked <= 20 else 5}",
            param=f"{prefix}logprobs",
        )
    if form == "openai" and endpoint == COMPLETIONS and (top is not None or asked is True):
        name = "logprobs" if top is None else "top_logprobs"
        raise Problem(
            f"{prefix}{name} is given as chat takes it",
            "give logprobs: 5 or another number",
            param=prefix + name,
        )
    if asked is None or asked is False:
        if top:
            raise Problem(
                f"{prefix}top_logprobs is given without logprobs",
                "give logprobs: true with it",
                param=f"{prefix}top_logprobs",
            )
        return None
    if asked is True:
        return top or 0
    if top is not None and top != asked:
        raise Problem(
            f"{prefix}logprobs and {prefix}top_logprobs differ",
            "give one of them as the number",
            param=f"{prefix}top_logprobs",
        )
    return asked


def _check_ids(ids: Any, path: str) -> None:
    for token in ids:
        if not 0 <= token < 2**31:
            raise Problem(
                f"{path} holds a number that is no token id",
                "give token ids as whole numbers from 0",
                param=path,
            )
