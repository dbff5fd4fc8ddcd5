"""Log-probabilities in the two shapes of the OpenAI API: chat's and completions'."""

from __future__ import annotations

from typing import Any

from pdbatch.request import PositionLogprobs, TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


def chat_logprobs(positions: list[PositionLogprobs] | None) -> dict[str, Any] | None:
    """`{"content": [{token, logprob, bytes, top_logprobs: […]}], "refusal": null}`."""
    if positions is None:
        return None
    content = [
        {**_chat_token(p.chosen), "top_logprobs": [_chat_token(t) for t in p.top]}
        for p in positions
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    positions: list[PositionLogprobs] | None, text_chars: int
) -> dict[str, Any] | None:
    """`{tokens, token_logprobs, top_logprobs, text_offset}`, one entry for each token.

    Offsets count characters of the output's text, `text_chars` long; tokens of a stop string that
    is no part of the text stand at its end. The chosen token is always among its top_logprobs,
    which are null where none were asked for.
    """
    if positions is None:
        return None
    offsets, offset = [], 0
    for position in positions:
        offsets.append(min(offset, text_chars))
        offset += len(position.chosen.token)
    any_top = any(p.top for p in positions)
    return {
        "tokens": [p.chosen.token for p in positions],
        "token_logprobs": [_finite(p.chosen.logprob) for p in positions],
        "top_logprobs": [_by_token(p) for p in positions] if any_top else None,
        "text_offset": offsets,
    }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    known = "\ufffd" not in token.token  # else the token is a part of a character
    return {
        "token": token.token,
        "logprob": _finite(token.logprob),
        "bytes": list(token.token.encode()) if known else None,
    }


def _by_token(position: PositionLogprobs) -> dict[str, float]:
    """The likeliest of equal texts stands for all of them; the chosen token for itself."""
    found: dict[str, float] = {}
    for token in position.top:
        found.setdefault(token.token, _finite(token.logprob))
    found.setdefault(position.chosen.token, _finite(position.chosen.logprob))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
