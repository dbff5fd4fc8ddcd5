"""What changes logits before a token is chosen: penalties, bias, and the mask of early ends.

All of it touches few tokens of a row, so it is gathered into lists of (row, token, number)
on the host and applied to those places only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pdbatch.engine.model_input import SamplingState
from pdbatch.engine.send import send


def is_adjusted(state: SamplingState) -> bool:
    """True if any logit of this row changes now."""
    params = state.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(params.logit_bias)
        or (state.position < params.min_tokens and bool(state.stop_token_ids))
    )


def adjust(logits_RV: torch.Tensor, states: Sequence[SamplingState], vocab_size: int) -> None:
    """Change float32 logits in place, row r for states[r].

    Repetition counts prompt and output (a positive logit is divided, a negative one
    multiplied), presence and frequency the output alone; then bias is added; then the stop
    tokens of rows below `min_tokens` become impossible. Ids outside the vocabulary are nobody's.
    """
    _repetition(logits_RV, states, vocab_size)
    _additive(logits_RV, states, vocab_size)
    _mask(logits_RV, states, vocab_size)


def _repetition(logits_RV: torch.Tensor, states: Sequence[SamplingState], vocab: int) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    penalties: list[float] = []
    for row, state in enumerate(states):
        penalty = state.params.repetition_penalty
        if penalty == 1.0:
            continue
        seen = {*state.prompt_token_ids, *state.output_token_ids}
        seen = {token for token in seen if 0 <= token < vocab}
        rows += [row] * len(seen)
        tokens += seen
        penalties += [penalty] * len(seen)
    if rows:
        at = _places(logits_RV, rows, tokens)
        penalty_P = send(penalties, torch.float32, logits_RV.device)
        old = logits_RV[at]
        logits_RV[at] = torch.where(old > 0, old / penalty_P, old * penalty_P)


def _additive(logits_RV: torch.Tensor, states: Sequence[SamplingState], vocab: int) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    amounts: list[float] = []
    for row, state in enumerate(states):
        params = state.params
        added = dict(params.logit_bias)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(state.output_token_ids).items():
                penalty = params.presence_penalty + params.frequency_penalty * count
                added[token] = added.get(token, 0.0) - penalty
        added = {token: amount for token, amount in added.items() if 0 <= token < vocab}
        rows += [row] * len(added)
        tokens += added.keys()
        amounts += added.values()
    if rows:
        amount_P = send(amounts, torch.float32, logits_RV.device)
        logits_RV.index_put_(_places(logits_RV, rows, tokens), amount_P, accumulate=True)


def _mask(logits_RV: torch.Tensor, states: Sequence[SamplingState], vocab: int) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    for row, state in enumerate(states):
        if state.position < state.params.min_tokens:
            stops = [token for token in state.stop_token_ids if 0 <= token < vocab]
            rows += [row] * len(stops)
            tokens += stops
    if rows:
        logits_RV[_places(logits_RV, rows, tokens)] = float("-inf")


def _places(
    logits_RV: torch.Tensor, rows: list[int], tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    places = send([rows, tokens], torch.int64, logits_RV.device)
    return places[0], places[1]
