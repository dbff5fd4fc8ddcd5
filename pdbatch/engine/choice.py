"""A batch's tokens between the device that chose them and the host.

Legend: S rows, V vocabulary, R some of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pdbatch.engine.model_input import SampledToken, SamplingState
from pdbatch.engine.send import send

ChooseAgain = Callable[[torch.Tensor, Sequence[SamplingState], int], torch.Tensor]
"""Token ids [R] from float32 logits [R, V] and states, of a batch of so many rows."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a choice was made from, for what is left to do when it is fetched."""

    logits_SV: torch.Tensor
    states: list[SamplingState]
    positions: list[int]
    """Of each state then: it moves on while the choice is on its way. Empty if all are greedy."""

    def rows(self, rows: Sequence[int]) -> tuple[torch.Tensor, list[SamplingState]]:
        """Some rows' logits, copied in float32, and their states as they were."""
        states = [
            replace(
                self.states[s],
                num_pending_tokens=self.positions[s] - len(self.states[s].output_token_ids),
            )
            for s in rows
        ]
        return rows_of(self.logits_SV, rows).float(), states


class Choice:
    """Tokens of one batch: chosen on the device, on their way here.

    `fetch` waits for the copy alone, not for what was launched after it, but for two cases: to
    report log-probabilities, and to choose again where a nucleus reached further than was guessed.
    """

    def __init__(
        self,
        tokens_S: torch.Tensor,
        asked: Asked,
        unsure_S: torch.Tensor | None,
        again: ChooseAgain,
    ) -> None:
        """`unsure_S` marks rows whose nucleus was cut short; `again` chooses those."""
        self.tokens = tokens_S
        self.corrected: list[int] = []
        self._again = again
        self._reported = [
            s for s, state in enumerate(asked.states) if state.params.logprobs is not None
        ]
        keeps = self._reported or unsure_S is not None
        self._asked = asked if keeps else None
        parts = [tokens_S] if unsure_S is None else [tokens_S, unsure_S.to(tokens_S.dtype)]
        self._host, self._event = torch.stack(parts), None
        if tokens_S.device.type == "cuda":
            sent = self._host
            self._host = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True)
            self._host.copy_(sent, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tokens_S.device))

    @torch.inference_mode()
    def fetch(self) -> list[SampledToken]:
        """One token for each row."""
        if self._event is not None:
            self._event.synchronize()
        self.corrected = []  # a fetch that ran out of memory is tried again
        chosen, *unsure = self._host.tolist()
        if self._asked is not None and unsure and any(unsure[0]):
            self._choose_again([s for s, mark in enumerate(unsure[0]) if mark], chosen, self._asked)
        result = [SampledToken(token, None) for token in chosen]
        if self._asked is not None and self._reported:
            states = self._asked.states
            wanted = [(states[s].params.logprobs or 0, chosen[s]) for s in self._reported]
            logits_RV = rows_of(self._asked.logits_SV, self._reported).float()
            reports = _report(torch.log_softmax(logits_RV, -1), wanted)
            for s, report in zip(self._reported, reports, strict=True):
                result[s] = report
        return result

    def _choose_again(self, rows: list[int], chosen: list[int], asked: Asked) -> None:
        """The rows' tokens from their whole nuclei, put into `chosen`."""
        tokens_R = self._again(*asked.rows(rows), len(chosen))
        for s, token in zip(rows, tokens_R.tolist(), strict=True):
            if token != chosen[s]:
                chosen[s] = token
                self.corrected.append(s)


def rows_of(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows as a copy."""
    return values.index_select(0, send(rows, torch.int64, values.device))


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
