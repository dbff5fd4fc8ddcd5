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
from pdbatch.engine.model_input import SampledToken, SamplingState
from pdbatch.engine.penalties import adjust, is_adjusted
from pdbatch.engine.send import send

_NUCLEUS = (256, 4096)
"""top_p looks among so many likeliest tokens; only where they fall short are all sorted."""


class Choice:
    """Tokens of one batch: chosen on the device, on their way here.

    `fetch` waits for the copy alone, not for what was launched after it; with log-probabilities
    to be reported it computes them, behind all that was launched.
    """

    def __init__(
        self, tokens_S: torch.Tensor, logits_SV: torch.Tensor, wanted: list[int | None]
    ) -> None:
        """`wanted[s]`: how many likeliest tokens row s reports; None: nothing but its token."""
        self.tokens = tokens_S
        self._wanted = wanted
        self._logits_SV = logits_SV if any(count is not None for count in wanted) else None
        self._host, self._event = tokens_S, None
        if tokens_S.device.type == "cuda":
            self._host = torch.empty(tokens_S.shape, dtype=tokens_S.dtype, pin_memory=True)
            self._host.copy_(tokens_S, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tokens_S.device))

    @torch.inference_mode()
    def fetch(self) -> list[SampledToken]:
        """One token for each row."""
        if self._event is not None:
            self._event.synchronize()
        chosen: list[int] = self._host.tolist()
        result = [SampledToken(token, None) for token in chosen]
        if self._logits_SV is not None:
            reported = [s for s, count in enumerate(self._wanted) if count is not None]
            wanted = [(self._wanted[s] or 0, chosen[s]) for s in reported]
            logprobs = torch.log_softmax(_rows(self._logits_SV, reported).float(), -1)
            for s, report in zip(reported, _report(logprobs, wanted), strict=True):
                result[s] = report
        return result


class Sampler:
    """Chooses tokens for a batch; float32 throughout, on the device of the logits."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device

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

        States are not changed, and not read after the return. Waits for the device only where
        `top_p` is asked for, to see how far a nucleus reaches.
        """
        if rows is not None:
            logits_SV = _rows(logits_SV, rows)
        special = [s for s, state in enumerate(states) if _is_special(state)]
        wanted = [state.params.logprobs for state in states]
        if len(special) == len(states):
            return Choice(self._choose(_widened(logits_SV), states), logits_SV, wanted)
        on_cpu = logits_SV.device.type == "cpu"  # where halves are compared one by one
        tokens_S = (logits_SV.float() if on_cpu else logits_SV).argmax(-1)
        if special:
            at_R = send(special, torch.int64, logits_SV.device)
            part_RV = logits_SV.index_select(0, at_R).float()
            tokens_S[at_R] = self._choose(part_RV, [states[s] for s in special])
        return Choice(tokens_S, logits_SV, wanted)

    def _choose(self, logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
        """Token ids [R]. `logits_RV` is a copy of the caller's and is changed."""
        adjust(logits_RV, states, self.vocab_size)
        drawn = [r for r, state in enumerate(states) if not state.params.greedy]
        if len(drawn) == len(states):
            return _draw(logits_RV, states)
        tokens_R = logits_RV.argmax(-1)
        if drawn:
            at_D = send(drawn, torch.int64, logits_RV.device)
            tokens_R[at_D] = _draw(logits_RV.index_select(0, at_D), [states[r] for r in drawn])
        return tokens_R


def _is_special(state: SamplingState) -> bool:
    return not state.params.greedy or is_adjusted(state)


def _widened(logits_SV: torch.Tensor) -> torch.Tensor:
    """A copy in float32."""
    return logits_SV.to(torch.float32, copy=True)


def _rows(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows as a copy."""
    return values.index_select(0, send(rows, torch.int64, values.device))


def _draw(logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Token ids [R], by the inverse of each row's cumulated probabilities; changes the logits."""
    params = [state.params for state in states]
    device = logits_RV.device
    logits_RV /= _column([p.temperature for p in params], device)
    _keep_min_p(logits_RV, [p.min_p for p in params])
    _keep_top_k(logits_RV, [p.top_k for p in params])
    probs_RV = torch.softmax(logits_RV, -1)
    _keep_top_p(probs_RV, [p.top_p for p in params])
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
    return torch.where(lost_R, probs_RV.argmax(-1), tokens_R)


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


def _keep_top_p(probs_RV: torch.Tensor, top_p: list[float]) -> None:
    """Set to 0 what is less likely than the last token of the nucleus."""
    rows = [r for r, p in enumerate(top_p) if p < 1]
    if not rows:
        return
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
        short = short[before.squeeze(1) >= best.shape[1]]
        if not short.numel() or best.shape[1] == part.shape[1]:
            break
    part.masked_fill_(part < floor_R1, 0.0)
    probs_RV[at] = part


def _best(values_RV: torch.Tensor, count: int) -> torch.Tensor:
    """Each row's greatest values in falling order; all of them if there are no more."""
    if count >= values_RV.shape[1]:
        return values_RV.sort(-1, descending=True).values
    return values_RV.topk(count, -1).values


def _report(logprobs_RV: torch.Tensor, wanted: list[tuple[int, int]]) -> list[SampledToken]:
    """For each row the log-probabilities of (how many likeliest, the chosen token)."""
    chosen = torch.tensor([token for _, token in wanted], device=logprobs_RV.device)
    own = logprobs_RV.gather(1, chosen[:, None]).squeeze(1).tolist()
    best = _likeliest(logprobs_RV, max(k for k, _ in wanted))
    return [
        SampledToken(token, own[row], tuple(best[row][:count]))
        for row, (count, token) in enumerate(wanted)
    ]


def _likeliest(values_RV: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """(token, value) of each row's `count` greatest or more, best first, equals by token id."""
    best: list[list[tuple[int, float]]] = [[] for _ in range(values_RV.shape[0])]
    if not count:
        return best
    last_R1 = values_RV.topk(min(count, values_RV.shape[1]), -1).values[:, -1:]
    rows, tokens = (values_RV >= last_R1).nonzero(as_tuple=True)
    found = values_RV[rows, tokens].tolist()
    for row, token, value in zip(rows.tolist(), tokens.tolist(), found, strict=True):
        best[row].append((token, value))
    for row_best in best:
        row_best.sort(key=lambda item: (-item[1], item[0]))
    return best
