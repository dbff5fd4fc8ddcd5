"""One batch: packed, computed, sampled."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from pdbatch.engine.admission import Encoder
from pdbatch.engine.batch import build_input
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.model_input import SampledToken
from pdbatch.engine.ports import Cache, Runner, TextSource, TokenSampler
from pdbatch.engine.scheduler import SchedulerOutput
from pdbatch.engine.sequence import Sequence


class Tokenization(Encoder, TextSource, Protocol):
    """Both directions of a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSide:
    """The neighbours that touch the device, and the tokenizer."""

    runner: Runner
    sampler: TokenSampler
    cache: Cache
    tokenizer: Tokenization
    eos_token_ids: tuple[int, ...]


class Stepper:
    """Runs what the scheduler chose."""

    def __init__(
        self,
        model: ModelSide,
        blocks: BlockManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._clock = clock

    def run(self, plan: SchedulerOutput) -> list[tuple[Sequence, SampledToken]]:
        """Compute the plan; the next token of each sequence that is through with its tokens.

        A request whose prompt is through gives one token for each of its outputs. Counts of
        computed tokens are moved on, and each request gets its share of the time; tokens are not
        appended yet. If anything is raised, no content can be found in the pool any more: some
        blocks were named before they were written.
        """
        sequences, start = plan.sequences, self._clock()
        try:
            chosen = self._compute(sequences, len(plan.decodes))
        except BaseException:
            self._blocks.pool.forget_all()
            raise
        token_s = (self._clock() - start) / plan.num_tokens
        for sequence in sequences:
            sequence.request.times.engine_s += token_s * sequence.num_scheduled_tokens
            sequence.num_computed_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0
        return chosen

    def _compute(
        self, sequences: SequenceOf[Sequence], num_decodes: int
    ) -> list[tuple[Sequence, SampledToken]]:
        batch = build_input(sequences, num_decodes, self._blocks.block_size)
        logits = self._model.runner.execute(batch)
        owners: list[Sequence] = []
        rows: list[int] = []
        for row, at in enumerate(batch.logits_indices):
            outputs = _outputs_of(sequences[at])
            owners += outputs
            rows += [row] * len(outputs)
        if not owners:
            return []
        if len(owners) != len(batch.logits_indices):
            logits = logits[rows]
        tokens = self._model.sampler.sample(logits, [owner.sampling for owner in owners])
        return list(zip(owners, tokens, strict=True))


def _outputs_of(sequence: Sequence) -> list[Sequence]:
    """Whose tokens a row of logits gives: all outputs of a request at its first token."""
    return [sequence] if sequence.output_token_ids else sequence.request.sequences
