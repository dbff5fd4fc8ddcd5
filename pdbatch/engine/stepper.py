"""One batch: packed, launched, sampled; and its tokens, when they have come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdbatch.engine.admission import Encoder
from pdbatch.engine.batch import Packer
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.blocks import BlockId
from pdbatch.engine.fences import Mark, over
from pdbatch.engine.flight import Flight
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
    """Launches what the scheduler chose, and retires it in order."""

    def __init__(
        self,
        model: ModelSide,
        blocks: BlockManager,
        *,
        hands_off: bool = False,
        mark: Mark = over,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hands_off`: requests leave at their first token, so nothing runs ahead of it.

        `mark` marks the stream that the model side works on.
        """
        self.flights: deque[Flight] = deque()
        """Launched and not retired, the oldest first."""
        self._model = model
        self._blocks = blocks
        self._packer = Packer(blocks.block_size)
        self._hands_off = hands_off
        self._mark = mark
        self._clock = clock
        self._retired_at_s = 0.0

    def launch(self, plan: SchedulerOutput) -> None:
        """Start to compute the plan; waits for nothing on a device that works on its own.

        Counts of computed tokens are moved on. A sequence that is through with its tokens has one
        more, pending; a request whose prompt is through has one for each of its outputs.
        """
        start_s, sequences = self._clock(), plan.sequences
        before = self.flights[-1].choice if self.flights else None
        tokens = before.tokens if before is not None else None
        batch = self._packer.pack(sequences, len(plan.decodes), tokens)
        logits = self._model.runner.execute(batch)
        owners, rows = self._owners(sequences, batch.logits_indices)
        choice = None
        if owners:
            states = [owner.sampling for owner in owners]
            choice = self._model.sampler.choose(logits, states, rows)
        counts = [sequence.num_scheduled_tokens for sequence in sequences]
        for sequence in sequences:
            sequence.num_computed_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0
            sequence.num_flights += 1
        for row, owner in enumerate(owners):
            owner.pending_row = row
            owner.sampling.num_pending_tokens += 1
            owner.waits = self._must_wait(owner)
        self.flights.append(Flight(sequences, counts, owners, choice, start_s, self._mark()))

    def retire(self) -> list[tuple[Sequence, SampledToken]]:
        """Wait for the oldest step; its tokens for the sequences that have not ended meanwhile.

        They are not appended yet, but not pending any more. Each request gets its share of the
        step's time: while one step follows the other, from retirement to retirement.
        """
        flight = self.flights[0]
        flight.settled()
        tokens = flight.choice.fetch() if flight.choice is not None else []
        self.flights.popleft()
        now_s = self._clock()
        spent_s = now_s - max(flight.launched_at_s, self._retired_at_s)
        self._retired_at_s = now_s
        token_s = spent_s / sum(flight.counts)
        for sequence, count in zip(flight.sequences, flight.counts, strict=True):
            sequence.request.times.engine_s += token_s * count
            sequence.num_flights -= 1
        chosen = []
        for owner, token in zip(flight.owners, tokens, strict=True):
            owner.sampling.num_pending_tokens -= 1
            owner.waits = owner.waits and owner.num_pending_tokens > 0
            if not (owner.finish_reason or owner.request.dropped or owner in flight.void):
                chosen.append((owner, token))
        for row in flight.choice.corrected if flight.choice is not None else ():
            self._take_back(flight.owners[row])
        self._release(flight)
        return chosen

    def give_back(self, sequence: Sequence) -> None:
        """Free a sequence's blocks; if a step in flight has it, when that is retired."""
        if sequence.num_flights:
            self.flights[-1].tables.append(self._blocks.detach(sequence))
        else:
            self._blocks.free(sequence)

    def drop(self) -> None:
        """Forget what is in flight; its sequences are the caller's to start over or to drop."""
        while self.flights:
            flight = self.flights.popleft()
            for sequence in flight.sequences:
                sequence.num_flights -= 1
            self._release(flight)

    @property
    def tables(self) -> list[list[BlockId]]:
        """Block tables that steps in flight own."""
        return [table for flight in self.flights for table in flight.tables]

    def _take_back(self, owner: Sequence) -> None:
        """The step in flight, if it has this sequence, runs a token that was guessed wrong: what
        it computes for it does not count, and the next one waits for it."""
        if owner.num_flights and self.flights:
            self.flights[-1].void.add(owner)
            owner.num_computed_tokens -= 1
            owner.waits = True

    def _release(self, flight: Flight) -> None:
        for table in flight.tables:
            self._blocks.pool.release(table)

    def _owners(
        self, sequences: list[Sequence], wanted: list[int]
    ) -> tuple[list[Sequence], list[int] | None]:
        """Whose tokens the rows of logits give, and which row each; None: one row for each.

        All outputs of a request have theirs from one row at its first token.
        """
        owners: list[Sequence] = []
        rows: list[int] = []
        for row, at in enumerate(wanted):
            sequence = sequences[at]
            outputs = sequence.request.sequences
            if len(outputs) == 1 or sequence.num_tokens > sequence.num_prompt_tokens:
                owners.append(sequence)
                rows.append(row)
            else:
                owners += outputs
                rows += [row] * len(outputs)
        return owners, rows if len(owners) != len(wanted) else None

    def _must_wait(self, owner: Sequence) -> bool:
        """Whether the pending token must be known before a step may run it: it may be the last
        for its length, its request may fork or leave with it, or the next choice may need it."""
        request = owner.request
        position = owner.num_tokens - owner.num_prompt_tokens
        if position >= request.max_tokens or owner.reads_outputs:
            return True
        return position == 1 and (self._hands_off or request.params.n > 1)
