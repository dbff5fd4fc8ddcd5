"""The engine: commands in, steps, events out.

Life of a request in an engine:

    1. Submit: encoded and checked (`admission`); a bad one ends here with its error.
    2. It waits, starts, and its prompt is computed (`scheduler`, `batch`, the runner).
    3. First token. Of n outputs those that go on fork here: full blocks shared, the last copied.
       On a prefill engine the request leaves instead: [pinned, unpinned) its blocks belong
       to the hand-off. One that ends with its first token never leaves.
    4. Decoded token by token; preempted and computed again if blocks run out.
    5. All outputs ended: blocks go back (full ones can still be found), the result goes out.

    On a decode engine 1 to 3 are: Adopt, read (`adoption`), the first tokens replayed.

`step` does one round: ended pulls, new pulls, one batch. The engine is one thread's; only the
threads of a pull write blocks beside it, and only blocks that their pull owns.

With `run_ahead` a round launches step N + 1 before it looks at the tokens of step N, so that the
device finds work while the host appends, ends, detokenises and schedules:

    collect pulls │ schedule N + 1 │ launch N + 1 │ wait for N's tokens │ append, end, hand off

Step N + 1 names a token that N chooses by its place on the device. A sequence is not in N + 1 if
N ends it for its length, or if its token must be looked at first (a fork, a hand-off). One
that ends by N's token, or is aborted, is in N + 1 in vain; its blocks are N + 1's until that is
retired. Before what needs all tokens known (a preemption, penalties, log-probabilities) `settle`
retires what is in flight. A step for which the device has no memory is taken back, and smaller ones
follow (`shortage`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pdbatch.engine.admission import Admission, Limits
from pdbatch.engine.adoption import Adoptions
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.config import Role
from pdbatch.engine.events import Outbox
from pdbatch.engine.fences import Mark, over
from pdbatch.engine.lifecycle import Lifecycle
from pdbatch.engine.memory import is_shortage, release_unused
from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    Command,
    Drain,
    Drained,
    EngineInfo,
    EngineRequest,
    Event,
    Reset,
    Shutdown,
    Stats,
    Submit,
    Unpin,
)
from pdbatch.engine.outgoing import Outgoing
from pdbatch.engine.ports import (
    PullRefused,
    Ranks,
    Transfers,
)
from pdbatch.engine.scheduler import Scheduler
from pdbatch.engine.sequence import ActiveRequest
from pdbatch.engine.shortage import Remedies, Shortage
from pdbatch.engine.stepper import ModelSide, Stepper
from pdbatch.errors import InvariantError

_PREPARED_AT_ONCE = 16
"""Waiting requests that a round looks at beside the device: a millisecond or two."""


class Engine:
    """One model, one pool of blocks, one role. See `pdbatch.engine.base.EngineBase`."""

    def __init__(
        self,
        model: ModelSide,
        blocks: BlockManager,
        transfers: Transfers | None,
        *,
        info: EngineInfo,
        role: Role,
        worker: str,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pinned_share: float = 0.5,
        preempt_every_steps: int | None = None,
        keep_prompts: bool = False,
        run_ahead: bool = False,
        mark: Mark = over,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`transfers` may be None for a mixed engine; `keep_prompts` puts prompts into results;
        `run_ahead` launches a step before the tokens of the one before it are looked at; `mark`
        marks the stream that the model side works on; `ranks` are processes that have parts of
        the model."""
        self.info = info
        self._blocks = blocks
        self._transfers = transfers
        self._ranks = ranks
        self._clock = clock
        self._preempt_every = preempt_every_steps
        self._run_ahead = run_ahead
        self._most_pinned = pinned_share * blocks.pool.num_blocks
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            foresees=role != "prefill",
        )
        limits = Limits(
            max_model_len=info.max_model_len,
            capacity_tokens=blocks.pool.num_blocks * blocks.block_size,
            hands_off=role == "prefill",
        )
        self._admission = Admission(model.tokenizer, limits, model.eos_token_ids, worker)
        self._adoptions = Adoptions(transfers, self.scheduler) if transfers is not None else None
        self._outgoing = Outgoing(transfers, blocks.pool, worker) if transfers is not None else None
        self._stepper = Stepper(model, blocks, hands_off=role == "prefill", mark=mark, clock=clock)
        self._out = Outbox()
        self._life = Lifecycle(
            model,
            blocks,
            self.scheduler,
            self._stepper,
            self._adoptions,
            self._outgoing,
            self._out,
            hands_off=role == "prefill",
            worker=worker,
            keep_prompts=keep_prompts,
            clock=clock,
        )
        remedies = Remedies(
            is_shortage=is_shortage,
            release=release_unused,
            start_over=self._life.start_over,
            fail=self._life.fail,
        )
        self._shortage = Shortage(
            self.scheduler, self._stepper, remedies if ranks is None else None
        )
        self._dropped: list[str] | None = None
        """While draining: what was dropped so far."""
        self._progress = False

    # --- commands

    def handle(self, command: Command) -> None:
        """Take a command; what it causes comes out of the next step."""
        match command:
            case Submit(requests=requests):
                for request in requests:
                    self.add(request)
            case Adopt(items=items):
                for item in items:
                    self.adopt(item)
            case Unpin(handoff_ids=ids):
                for handoff_id in ids:
                    self.unpin(handoff_id)
            case Abort(keys=keys):
                for key in keys:
                    self.abort(key)
            case Reset(epoch=epoch):
                self.reset(epoch)
            case Drain():
                self.drain()
            case Shutdown():
                raise InvariantError("Shutdown is for the process, not for the engine")
        self._progress = True

    def add(self, request: EngineRequest) -> None:
        """Run a request from its start; one of the same key that is still here is dropped."""
        if self._dropped is not None:
            self._dropped.append(request.key)
            return
        self._life.drop(request.key)
        admitted = self._admission.admit(request, self._clock())
        if isinstance(admitted, ActiveRequest):
            self._life.open[admitted.key] = admitted
            self.scheduler.add(admitted.sequences[0])
        else:
            self._out.finished.append(admitted)

    def adopt(self, item: Adoption) -> None:
        """Read and decode a claimed request; answered by Pulled or PullFailed.

        One that can never fit here is answered by Pulled, without a read, and its error.
        """
        try:
            if self._transfers is None or self._adoptions is None:
                raise PullRefused("NoTransport", "this engine reads nobody's KV")
            incoming = self._transfers.read(item)
            if incoming.payload.key in self._life.open:
                message = "the request is in this engine already"
                raise PullRefused("Duplicate", message, incoming.payload.key)
        except PullRefused as refused:
            self._out.pull_failed(item.handoff_id, refused.key, refused.code, str(refused))
            return
        request = self._admission.adopt(incoming.payload, incoming.prompt_token_ids, self._clock())
        if isinstance(request, ActiveRequest):
            self._life.open[request.key] = request
            self._adoptions.add(incoming, request)
        else:
            self._out.pulled.append(item.handoff_id)
            self._out.finished.append(request)

    def unpin(self, handoff_id: str) -> None:
        """A hand-off is over: its blocks go back. Unknown ones are ignored."""
        if self._outgoing is not None:
            self._outgoing.unpin(handoff_id)

    def abort(self, key: str) -> None:
        """Drop a request wherever it is. Its adoption is answered by PullFailed `Aborted`."""
        self._life.drop(key)
        if self._outgoing is not None:
            self._outgoing.unpin_key(key)

    def reset(self, epoch: int) -> None:
        """Drop everything; go on under this epoch. Nothing that was dropped is answered."""
        self._stepper.drop()
        self._life.drop_all()
        if self._outgoing is not None:
            self._outgoing.unpin_all()
        self._blocks.pool.forget_all()
        self._out.clear()
        self._dropped = None
        if self._transfers is not None:
            self._transfers.reset(epoch)

    def drain(self) -> None:
        """Drop what has not begun, finish what runs, then answer `Drained`. Pins stay."""
        self._dropped = (self._dropped or []) + self._life.drop_waiting()

    # --- a step

    @property
    def busy(self) -> bool:
        """Whether another step may find something to do without anything new."""
        return self._progress or self._out.pending or bool(self._stepper.flights)

    def step(self) -> list[Event]:
        """Ended pulls, new pulls, one batch; the events of all that.

        If the model side raises, nothing of what was computed counts: content of blocks is
        forgotten, since some were named before they were written, and what ran waits to be
        computed again.
        """
        self._progress = False
        try:
            self._collect()
            self._compute()
        except BaseException:
            self._life.start_over()
            raise
        if self._dropped is not None and not self._life.open and not self._pulls:
            self._out.other.append(Drained(dropped=self._dropped))
            self._dropped = None
        if self._ranks is not None:
            self._ranks.check()
        return self._out.take()

    def settle(self) -> None:
        """Retire what is in flight: all tokens are known then, ended sequences hold nothing."""
        while self._stepper.flights:
            self._life.advance(self._shortage.retire())

    def _collect(self) -> None:
        """Ended pulls, new pulls."""
        if self._adoptions is not None:
            for pull, ended in self._adoptions.collect():
                self._life.end_pull(pull, ended)
                self._progress = True
            if self._adoptions.start():
                self._progress = True

    def _compute(self) -> None:
        """Schedule and launch one batch; retire it, or the one before it if we run ahead."""
        flights = self._stepper.flights
        preempts = self._preempt_every and self._out.steps % self._preempt_every == 0
        if flights and (preempts or flights[-1].reads_outputs or self.scheduler.must_preempt):
            self.settle()
        if preempts:
            self._out.preemptions += self.scheduler.preempt_last()
        plan = self.scheduler.schedule(may_start=self._may_start())
        self._out.preemptions += len(plan.preempted)
        launched = False
        if plan.num_tokens:
            for sequence in plan.started:
                self._life.start(sequence)
            launched = self._shortage.launch(plan)
            if self._run_ahead:
                self.scheduler.prepare(_PREPARED_AT_ONCE)
            self._out.steps += launched
            self._progress = True
        ahead = 1 if self._run_ahead and launched else 0
        while len(flights) > ahead:
            self._life.advance(self._shortage.retire())
            self._progress = True
        if flights and not flights[-1].alive:
            self.settle()

    def stats(self) -> Stats:
        """Counts of now; waiting and running are sequences."""
        pool = self._blocks.pool
        return Stats(
            waiting=self.scheduler.num_waiting,
            running=len(self.scheduler.running),
            pulling=self._pulls,
            pinned_requests=len(self._outgoing) if self._outgoing is not None else 0,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            used_blocks=pool.num_used,
            total_blocks=pool.num_blocks,
            prompt_tokens=self._out.prompt_tokens,
            cached_tokens=self._out.cached_tokens,
            output_tokens=self._out.output_tokens,
            preemptions=self._out.preemptions,
            steps=self._out.steps,
            pulled_bytes=self._out.pulled_bytes,
            held=self.scheduler.is_held,
        )

    def fileno(self) -> int:
        """Readable when a pull has ended; -1 for an engine that never pulls."""
        return self._transfers.fileno() if self._transfers is not None else -1

    def check(self) -> None:
        """Every block has exactly the holders it counts. Raises InvariantError with numbers."""
        tables = [sequence.block_table for sequence in self.scheduler.running]
        if self._outgoing is not None:
            tables += self._outgoing.tables
        if self._adoptions is not None:
            tables += self._adoptions.tables
        tables += self._stepper.tables
        self._blocks.check(tables)
        in_flight = {owner for flight in self._stepper.flights for owner in flight.owners}
        for sequence in self.scheduler.running:
            if (
                sequence.num_scheduled_tokens
                or sequence.num_uncomputed_tokens < 1
                or sequence.num_pending_tokens != (sequence in in_flight)
            ):
                raise InvariantError(f"{sequence!r} between two steps")

    def close(self) -> None:
        """Stop serving peers; wait for pulls under way; end other ranks."""
        if self._ranks is not None:
            self._ranks.close()
        if self._transfers is not None:
            self._transfers.close()

    @property
    def _pulls(self) -> int:
        return len(self._adoptions) if self._adoptions is not None else 0

    def _may_start(self) -> bool:
        """False while what is pinned exceeds its budget: decode sets the pace."""
        return self._outgoing is None or self._outgoing.num_blocks <= self._most_pinned
