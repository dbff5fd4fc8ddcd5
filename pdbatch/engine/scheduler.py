"""Decides what the next step computes; the runner obeys.

One call of `schedule` a step:

    1. Decodes first: each running sequence with one token to compute gets its block. Where
       none is free, the running sequence that comes last (priority, then arrival) and is not in
       this step yet is preempted: it gives its blocks back and waits to be computed again (from
       the prefix cache, with luck).
    2. Then prefills under way, then waiting sequences, first come first served within a
       priority, until `max_num_batched_tokens` or `max_num_seqs` is reached. A prompt that does
       not fit into what is left of the step is computed in chunks. A sequence starts only when
       all its known tokens find blocks, so only decodes grow and only they preempt; and only
       when it is foreseen that all that run find theirs to the end (`forecast`).

The step before may be in flight: its sequences then have a pending token, which runs like a known
one, or wait for it and are passed over. Nobody is preempted then: `must_preempt` is asked first.

Sequences are ordered by `Sequence.order`. Nothing starts over somebody else's head: if the
first in line finds no room, the others wait too.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pdbatch.engine.block_manager import BlockManager, MayTake
from pdbatch.engine.forecast import OutputLengths, Room
from pdbatch.engine.sequence import Sequence, SequenceState
from pdbatch.errors import InvariantError

_HELD_STEPS = 16
"""For so many steps nobody asks again whether the pool will do, unless somebody ends."""


@dataclass(slots=True)
class SchedulerOutput:
    """What one step computes. Sequences carry their share in `num_scheduled_tokens`."""

    decodes: list[Sequence] = field(default_factory=list)
    """One token each, after at least one computed; in order."""
    prefills: list[Sequence] = field(default_factory=list)
    """A chunk of known tokens each, those under way before new ones."""
    started: list[Sequence] = field(default_factory=list)
    """Of the prefills, those that were waiting until now."""
    preempted: list[Sequence] = field(default_factory=list)
    """Lost their blocks and wait again."""
    num_tokens: int = 0
    """Tokens of the whole step."""

    @property
    def sequences(self) -> list[Sequence]:
        """Everything in the step, in the order of the batch."""
        return self.decodes + self.prefills


class Scheduler:
    """Holds the waiting and the running sequences. Not safe for several threads."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        foresees: bool = True,
    ) -> None:
        """Without `foresees` whoever finds blocks starts: where sequences leave at their first
        token nothing grows."""
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        """In order; they hold blocks."""
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._waiting: set[Sequence] = set()
        """Those of the heap that still wait: who left it stays there as a shell."""
        self._unprepared: deque[Sequence] = deque()
        self.foresees = foresees
        self._lengths = OutputLengths()
        self._held = 0
        """Steps for which nobody starts, since the pool would not do."""
        self._held_at = 0
        """While so many run; of none it would never be asked again."""

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Sequence]:
        """The waiting sequences, in order."""
        return sorted(self._waiting, key=lambda sequence: sequence.order)

    def add(self, sequence: Sequence) -> None:
        """A sequence without blocks waits for its turn."""
        sequence.state = SequenceState.WAITING
        self._waiting.add(sequence)
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._unprepared.append(sequence)

    def prepare(self, count: int) -> None:
        """Hash the prompts of so many that wait, which starting them would need, while the device
        has work to do."""
        while self._unprepared and count:
            sequence = self._unprepared.popleft()
            if sequence in self._waiting:
                self.blocks.prepare(sequence)
                count -= 1

    def add_running(self, sequence: Sequence) -> None:
        """A sequence that already holds blocks (forked or adopted) takes part in steps."""
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda other: other.order)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended or leaves; its blocks are the caller's business."""
        if sequence.finish_reason is not None and sequence.state is not SequenceState.FINISHED:
            by_itself = sequence.finish_reason == "stop"
            self._lengths.ended(len(sequence.output_token_ids), by_itself=by_itself)
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.discard(sequence)
        sequence.state = SequenceState.FINISHED

    def has_room(self, count: int) -> bool:
        """Whether so many more sequences may run."""
        return len(self.running) + count <= self.max_num_seqs

    @property
    def reserve(self) -> int:
        """Blocks that stay free for running sequences to grow when others start."""
        return min(len(self.running), max(1, self.blocks.pool.num_blocks // 100))

    @property
    def is_held(self) -> bool:
        """Whether nobody may start, since the pool would not have done a moment ago."""
        return self._held > 0 and len(self.running) >= self._held_at

    def foresight(self, coming: Iterable[Sequence] = ()) -> MayTake | None:
        """Asks whether the pool will do for one more, to the end of all; who may start counts from
        then on. `coming` are those whose KV is being read. None: nobody needs to ask."""
        if not self.foresees:
            return None
        rooms: list[Room] = []

        def may(sequence: Sequence, taken: int) -> bool:
            if not rooms:
                rooms.append(Room(self.blocks, self._lengths, [*self.running, *coming]))
            if rooms[0].takes(sequence, taken, self.reserve):
                return True
            self._held, self._held_at = _HELD_STEPS, max(1, len(self.running))
            return False

        return may

    def schedule(self, *, may_start: bool = True) -> SchedulerOutput:
        """Choose the next step. With `may_start=False` no waiting sequence begins."""
        plan = SchedulerOutput()
        self._held = max(0, self._held - 1)
        self._schedule_decodes(plan)
        self._schedule_chunks(plan)
        if may_start:
            self._start_waiting(plan)
        return plan

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it is computed again later."""
        if sequence.num_scheduled_tokens:
            raise InvariantError(f"{sequence!r} preempted in its own step")
        self.remove(sequence)
        self.blocks.free(sequence)
        self.add(sequence)

    def take_back(self, plan: SchedulerOutput) -> None:
        """The plan is not computed after all: who began in it waits again, the others go on as
        before, and nobody finds blocks that it was to write."""
        for sequence in plan.sequences:
            sequence.num_scheduled_tokens = 0
            self.blocks.uncommit(sequence)
        for sequence in plan.started:
            self.preempt(sequence)

    @property
    def must_preempt(self) -> bool:
        """Whether the decodes that could run now would need more blocks than are free."""
        free = self.blocks.pool.num_free
        if free >= len(self.running):
            return False
        size = self.blocks.block_size
        growing = sum(
            sequence.num_computed_tokens >= len(sequence.block_table) * size
            for sequence in self.running
            if not sequence.waits
        )
        return growing > free

    def preempt_last(self) -> int:
        """Preempt the decoding sequence that comes last, for verification; how many that were.

        Every sequence still gets on: what is computed again yields a token before it can be hit.
        """
        for sequence in reversed(self.running):
            if sequence.num_uncomputed_tokens == 1:
                self.preempt(sequence)
                return 1
        return 0

    def _schedule_decodes(self, plan: SchedulerOutput) -> None:
        size = self.blocks.block_size
        for sequence in self.running.copy():
            if plan.num_tokens >= self.max_num_batched_tokens:
                break
            if sequence.waits or sequence.state is not SequenceState.RUNNING:  # just preempted
                continue
            computed = sequence.num_computed_tokens
            if computed == 0 or sequence.num_tokens - computed != 1:
                continue
            if computed < len(sequence.block_table) * size or self._grow(sequence, plan):
                self._take(sequence, 1, plan)
                plan.decodes.append(sequence)

    def _schedule_chunks(self, plan: SchedulerOutput) -> None:
        for sequence in self.running:
            left = self.max_num_batched_tokens - plan.num_tokens
            if left <= 0:
                break
            if sequence.num_scheduled_tokens == 0 and not sequence.waits:
                self._take(sequence, min(left, sequence.num_uncomputed_tokens), plan)
                plan.prefills.append(sequence)

    def _start_waiting(self, plan: SchedulerOutput) -> None:
        """Who is in its last step leaves its place already: the device need not wait for that."""
        if not self._waiting or self.is_held:
            return
        most = self.max_num_seqs + sum(s.waits and s.is_ending for s in self.running)
        may = self.foresight()
        while self._waiting and len(self.running) < most:
            left = self.max_num_batched_tokens - plan.num_tokens
            sequence = self._heap[0][1]
            if sequence not in self._waiting:
                heapq.heappop(self._heap)
                continue
            if left <= 0 or not self.blocks.admit(sequence, self.reserve, may):
                break
            heapq.heappop(self._heap)
            self._waiting.discard(sequence)
            self.add_running(sequence)
            self._take(sequence, min(left, sequence.num_uncomputed_tokens), plan)
            plan.prefills.append(sequence)
            plan.started.append(sequence)

    def _take(self, sequence: Sequence, count: int, plan: SchedulerOutput) -> None:
        sequence.num_scheduled_tokens = count
        plan.num_tokens += count
        after = sequence.num_computed_tokens + count
        if after // self.blocks.block_size > sequence.num_registered_blocks:
            self.blocks.commit(sequence, min(after, sequence.num_known_tokens))

    def _grow(self, sequence: Sequence, plan: SchedulerOutput) -> bool:
        """A block for the next token, at the cost of who comes last; False if that is itself."""
        while not self.blocks.grow(sequence):
            victim = next(s for s in reversed(self.running) if s.num_scheduled_tokens == 0)
            self.preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True
