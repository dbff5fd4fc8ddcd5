"""Chooses the next token of each row.

Legend: S rows, V vocabulary, R rows that are not plainly greedy, K candidates.

Order: penalties, logit bias, mask of the stop tokens before min_tokens, temperature, then
what min_p, top_k and top_p leave, then one draw. Greedy rows end after the mask. Reported
log-probabilities are those of the model: before all of this.

A row never depends on its batch mates: every step works on each row by its own numbers, the
draw's uniform is keyed by (seed, output, position), and truncation keeps values, not places,
so equal logits are kept or dropped together and the draw goes by token id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdbatch.engine import rng
from pdbatch.engine.choice import Asked, Choice, rows_of
from pdbatch.engine.model_input import SampledToken, SamplingState
from pdbatch.engine.penalties import adjust, is_adjusted
from pdbatch.engine.send import send

_NUCLEUS = (256, 4096)
"""top_p looks among so many likeliest tokens; only where they fall short are all sorted."""
_TOLERABLE = 16
"""One guessed row of so many may fail; if more do,"""
_EXACT_STEPS = 100
"""so many choices are made without guesses."""
_SORTED_AT_ONCE = 1 << 24
"""Numbers: where whole rows may be sorted, which takes several times their memory."""


class Sampler:
    """Chooses tokens for a batch; float32 throughout, on the device of the logits."""

    def __init__(self, vocab_size: int, device: torch.device, *, guess: bool | None = None) -> None:
        """`guess`: take a nucleus (`top_p`) to lie among the likeliest few hundred tokens, and look
        whether it did when the choice is fetched; None: where looking would wait for a device."""
        self.vocab_size = vocab_size
        self.device = device
        self._guess = device.type == "cuda" if guess is None else guess
        self._exact_steps = 0
        """So many more choices are made without a guess."""

    def sample(
        self, logits_SV: torch.Tensor, states: Sequence[SamplingState]
    ) -> list[SampledToken]:
        """`choose` and `fetch` in one."""
        return self.choose(logits_SV, states).fetch()

    @torch.inference_mode()
    def choose(
        self,
        logits_SV: torch.Tensor,
        states: Sequence[SamplingState],
        rows: Sequence[int] | None = None,
    ) -> Choice:
        """One token for each state, from row `rows[s]` of the logits (None: row s).

        States are not changed. Waits for nothing on a device that works on its own, but where
        nuclei are not guessed.
        """
        if rows is not None:
            logits_SV = rows_of(logits_SV, rows)
        special = [s for s, state in enumerate(states) if _is_special(state)]
        positions = [state.position for state in states] if special else []
        asked = Asked(logits_SV, list(states), positions)
        guess = self._guess and not self._exact_steps
        self._exact_steps = max(0, self._exact_steps - 1)
        if len(special) == len(states):
            tokens_S, unsure_S = self._choose(_widened(logits_SV), states, guess)
            return Choice(tokens_S, asked, unsure_S, self._choose_again)
        on_cpu = logits_SV.device.type == "cpu"  # where halves are compared one by one
        tokens_S = (logits_SV.float() if on_cpu else logits_SV).argmax(-1)
        unsure_S = None
        if special:
            at_R = send(special, torch.int64, logits_SV.device)
            part_RV = logits_SV.index_select(0, at_R).float()
            picked = [states[s] for s in special]
            tokens_S[at_R], unsure_R = self._choose(part_RV, picked, guess)
            if unsure_R is not None:
                unsure_S = torch.zeros_like(tokens_S, dtype=torch.bool)
                unsure_S[at_R] = unsure_R
        return Choice(tokens_S, asked, unsure_S, self._choose_again)

    def _choose_again(
        self, logits_RV: torch.Tensor, states: Sequence[SamplingState], batch: int
    ) -> torch.Tensor:
        """Token ids [R] where a guess failed, in a batch of so many rows; waits for the device.

        Where many fail, distributions are flat, and guesses cost more than they bring: the next
        `_EXACT_STEPS` choices make none.
        """
        if len(states) * _TOLERABLE > batch:
            self._exact_steps = _EXACT_STEPS
        return self._choose(logits_RV, states, False)[0]

    def _choose(
        self, logits_RV: torch.Tensor, states: Sequence[SamplingState], guess: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids [R], and which rows' nuclei were cut short, if that was guessed for any.

        `logits_RV` is a copy of the caller's and is changed. Without a guess it goes some rows at
        a time.
        """
        most = max(1, _SORTED_AT_ONCE // self.vocab_size)
        if not guess and len(states) > most:
            firsts = range(0, len(states), most)
            parts = [(logits_RV[r : r + most], states[r : r + most]) for r in firsts]
            return torch.cat([self._choose(*part, guess)[0] for part in parts]), None
        adjust(logits_RV, states, self.vocab_size)
        drawn = [r for r, state in enumerate(states) if not state.params.greedy]
        if len(drawn) == len(states):
            return _draw(logits_RV, states, guess)
        tokens_R = logits_RV.argmax(-1)
        unsure_R = None
        if drawn:
            at_D = send(drawn, torch.int64, logits_RV.device)
            part_DV = logits_RV.index_select(0, at_D)
            tokens_R[at_D], unsure_D = _draw(part_DV, [states[r] for r in drawn], guess)
            if unsure_D is not None:
                unsure_R = torch.zeros_like(tokens_R, dtype=torch.bool)
                unsure_R[at_D] = unsure_D
        return tokens_R, unsure_R


def _is_special(state: SamplingState) -> bool:
    return not state.params.greedy or is_adjusted(state)


def _widened(logits_SV: torch.Tensor) -> torch.Tensor:
    """A copy in float32."""
    return logits_SV.to(torch.float32, copy=True)


def _draw(
    logits_RV: torch.Tensor, states: Sequence[SamplingState], guess: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids [R], by the inverse of each row's cumulated probabilities; changes the logits.

    And, as `_keep_top_p`, which rows' nuclei were cut short.
    """
    params = [state.params for state in states]
    device = logits_RV.device
    logits_RV /= _column([p.temperature for p in params], device)
    _keep_min_p(logits_RV, [p.min_p for p in params])
    _keep_top_k(logits_RV, [p.top_k for p in params])
    probs_RV = torch.softmax(logits_RV, -1)
    unsure_R = _keep_top_p(probs_RV, [p.top_p for p in params], guess)
    cumulated_RV = probs_RV.cumsum(-1)
    uniforms = rng.uniforms(
        [state.seed for state in states],
        [state.output_index for state in states],
        [state.position for state in states],
    )
    target_R1 = send(uniforms, torch.float32, device)[:, None] * cumulated_RV[:, -1:]
    tokens_R = torch.searchsorted(cumulated_RV, target_R1).squeeze(1)
    # A parallel sum may fall by a rounding; never take a token that was truncated away.
    tokens_R = tokens_R.clamp_(max=probs_RV.shape[1] - 1)
    lost_R = probs_RV.gather(1, tokens_R[:, None]).squeeze(1) <= 0
    return torch.where(lost_R, probs_RV.argmax(-1), tokens_R), unsure_R


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return send(values, torch.float32, device)[:, None]


def _keep_min_p(logits_RV: torch.Tensor, min_p: list[float]) -> None:
    rows = [r for r, value in enumerate(min_p) if value > 0]
    if not rows:
        return
    floor_R1 = _column([min_p[r] for r in rows], logits_RV.device).log()
    at = send(rows, torch.int64, logits_RV.device)
    part = logits_RV.index_select(0, at)
    part.masked_fill_(part < part.amax(-1, keepdim=True) + floor_R1, float("-inf"))
    logits_RV[at] = part


def _keep_top_k(logits_RV: torch.Tensor, top_k: list[int]) -> None:
    """Keep what is at least as likely as the k-th likeliest."""
    rows = [r for r, k in enumerate(top_k) if 0 < k < logits_RV.shape[1]]
    if not rows:
        return
    at = send(rows, torch.int64, logits_RV.device)
    part = logits_RV.index_select(0, at)
    kth = send([top_k[r] - 1 for r in rows], torch.int64, part.device)[:, None]
    best_RK = part.topk(max(top_k[r] for r in rows), -1).values
    part.masked_fill_(part < best_RK.gather(1, kth), float("-inf"))
    logits_RV[at] = part


def _keep_top_p(probs_RV: torch.Tensor, top_p: list[float], guess: bool) -> torch.Tensor | None:
    """Set to 0 what is less likely than the last token of the nucleus.

    With `guess` only the first of `_NUCLEUS` is tried, and rows [R] that needed more are marked.
    """
    rows = [r for r, p in enumerate(top_p) if p < 1]
    if not rows:
        return None
    unsure_R = None
    at = send(rows, torch.int64, probs_RV.device)
    part = probs_RV.index_select(0, at)
    limit_R1 = _column([top_p[r] for r in rows], part.device)
    floor_R1 = torch.zeros_like(limit_R1)
    short = torch.arange(len(rows), device=part.device)
    for count in (*_NUCLEUS, part.shape[1]):
        best = _best(part.index_select(0, short), count)
        cumulated = best.cumsum(-1)
        before = (cumulated < limit_R1[short]).sum(-1, keepdim=True)
        floor_R1[short] = best.gather(1, before.clamp(max=best.shape[1] - 1))
        if guess and best.shape[1] < part.shape[1]:
            unsure_R = torch.zeros(len(probs_RV), dtype=torch.bool, device=part.device)
            unsure_R[at] = before.squeeze(1) >= best.shape[1]
            break
        short = short[before.squeeze(1) >= best.shape[1]]
        if not short.numel() or best.shape[1] == part.shape[1]:
            break
    part.masked_fill_(part < floor_R1, 0.0)
    probs_RV[at] = part
    return unsure_R


def _best(values_RV: torch.Tensor, count: int) -> torch.Tensor:
    """Each row's greatest values in falling order; all of them if there are no more."""
    if count >= values_RV.shape[1]:
        return values_RV.sort(-1, descending=True).values
    return values_RV.topk(count, -1).values
