"""The stations of requests in an engine: started, first token, forked or handed over, ended.

Blocks and the scheduler's lists change here and nowhere else between two steps. Who holds a
request's blocks, as half-open intervals:

    [started, first token)           its first sequence
    [first token, ended)             each sequence its own; equal full blocks are shared
    [first token, unpinned)          the hand-off, on a prefill engine
    [read begun, read ended)         the pull, on a decode engine; then as above
    [ended, retired)                 the step in flight, where that has the sequence already
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pdbatch.engine.adoption import Adoptions, Pull
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.events import Outbox
from pdbatch.engine.model_input import SampledToken
from pdbatch.engine.outgoing import Outgoing
from pdbatch.engine.outputs import advance, failure, result
from pdbatch.engine.payload import sampled_token
from pdbatch.engine.ports import PullResult
from pdbatch.engine.scheduler import Scheduler
from pdbatch.engine.sequence import ActiveRequest, Sequence, SequenceState
from pdbatch.engine.stepper import ModelSide, Stepper


class Lifecycle:
    """The open requests of one engine. `hands_off`: they leave at their first token."""

    def __init__(
        self,
        model: ModelSide,
        blocks: BlockManager,
        scheduler: Scheduler,
        stepper: Stepper,
        adoptions: Adoptions | None,
        outgoing: Outgoing | None,
        out: Outbox,
        *,
        hands_off: bool,
        worker: str,
        keep_prompts: bool,
        clock: Callable[[], float],
    ) -> None:
        self.open: dict[str, ActiveRequest] = {}
        """By key: waiting, running, or on its way in; not those that are pinned."""
        self._model = model
        self._blocks = blocks
        self._scheduler = scheduler
        self._stepper = stepper
        self._adoptions = adoptions
        self._outgoing = outgoing if hands_off else None
        self._out = out
        self._worker = worker
        self._decodes = not hands_off
        self._keep_prompts = keep_prompts
        self._clock = clock

    def start(self, sequence: Sequence) -> None:
        """Count the prompt once, when its first chunk is scheduled."""
        request = sequence.request
        if request.started:
            return
        request.started = True
        request.times.queued_s = request.close_stage(self._clock())
        request.num_cached_tokens = sequence.num_computed_tokens
        self._out.prompt_tokens += request.num_prompt_tokens
        self._out.cached_tokens += request.num_cached_tokens
        for index in range(1, request.params.n):
            request.sequences.append(Sequence(request, index))

    def advance(self, chosen: list[tuple[Sequence, SampledToken]]) -> None:
        """Append a step's tokens; end, fork or hand off what that brings to an end or a start.

        The step after it may be in flight by now, with these tokens as its input.
        """
        firsts: dict[str, list[SampledToken]] = {}
        for sequence, token in chosen:
            first = not sequence.output_token_ids
            if first:
                firsts.setdefault(sequence.request.key, []).append(token)
            ended = advance(sequence, token, self._model.tokenizer)
            if sequence.num_known_tokens % self._blocks.block_size == 0:
                self._commit(sequence)
            if ended and not first:
                self._end_sequence(sequence)
        for key, tokens in firsts.items():
            self._first_tokens(self.open[key], tokens)
        self._out.output_tokens += len(chosen)

    def end_pull(self, pull: Pull, ended: PullResult) -> None:
        """Proved KV: replay the first tokens and decode. Anything else: say so."""
        if pull.dropped:
            return
        request = pull.request
        if ended.code is not None:
            del self.open[request.key]
            self._out.pull_failed(ended.handoff_id, request.key, ended.code, ended.message)
            return
        self._out.pulled.append(ended.handoff_id)
        self._out.pulled_bytes += ended.num_bytes
        offered_s = time.time() - pull.incoming.payload.pinned_at
        request.times.handoff_s = max(0.0, offered_s - ended.seconds)
        request.times.transfer_s = ended.seconds
        request.transfer = ended.transfer
        request.close_stage(self._clock())
        first = pull.incoming.payload.first
        request.sequences += [Sequence(request, index) for index in range(1, len(first))]
        for sequence, token in zip(request.sequences, first, strict=True):
            advance(sequence, sampled_token(token), self._model.tokenizer)
        if request.finished:
            self._finish(request)
        else:
            self._branch(request)

    def start_over(self) -> None:
        """Nothing of what steps have computed counts any more: no content of blocks can be found,
        steps in flight are forgotten, what runs waits to be computed again."""
        self._stepper.drop()
        self._blocks.pool.forget_all()
        for request in self.open.values():
            for sequence in request.sequences:
                sequence.sampling.num_pending_tokens = 0
                sequence.num_scheduled_tokens = 0
                sequence.waits = False
                if sequence.state is SequenceState.RUNNING:
                    self._scheduler.preempt(sequence)

    def fail(self, request: ActiveRequest, code: str, message: str) -> None:
        """End an open request with an error that is no mistake of the user's."""
        request.dropped = True
        self._remove_sequences(request)
        del self.open[request.key]
        worker = request.prefill_worker
        self._out.finished.append(failure(request.key, code, message, worker=worker, status=None))

    def drop(self, key: str) -> None:
        """Forget a request that runs, waits, is being read, or was refused just now."""
        self._out.drop(key)
        request = self.open.pop(key, None)
        if request is None:
            return
        request.dropped = True
        pulls = self._adoptions.drop(key) if self._adoptions is not None else []
        for pull in pulls:
            message = "the request was aborted"
            self._out.pull_failed(pull.incoming.handoff_id, key, "Aborted", message)
        if not pulls:
            self._remove_sequences(request)

    def drop_all(self) -> None:
        """Forget every request; what is being read gives its blocks back when that ends."""
        for pull in self._adoptions.drop_all() if self._adoptions is not None else ():
            del self.open[pull.request.key]
        for key in list(self.open):
            self._remove_sequences(self.open.pop(key))

    def drop_waiting(self) -> list[str]:
        """Forget the requests that have not begun; their keys."""
        pulls = self._adoptions.drop_waiting() if self._adoptions is not None else []
        dropped = [pull.request for pull in pulls]
        dropped += [request for request in self.open.values() if not request.started]
        for request in dropped:
            self._remove_sequences(self.open.pop(request.key))
        return [request.key for request in dropped]

    def _first_tokens(self, request: ActiveRequest, tokens: list[SampledToken]) -> None:
        """Every output of a request has its first token: finish, hand off or go on."""
        request.times.prefill_s = request.close_stage(self._clock())
        if request.finished:
            self._finish(request)
        elif self._outgoing is not None:
            self._hand_off(request, tokens, self._outgoing)
        else:
            self._branch(request)

    def _branch(self, request: ActiveRequest) -> None:
        """The outputs that go on share the prompt's blocks; those without room wait."""
        lead, live = request.sequences[0], [s for s in request.sequences if not s.finish_reason]
        holder = live[0]
        if holder is not lead:
            self._blocks.move(lead, holder)
            self._scheduler.remove(lead)
        if holder.state is not SequenceState.RUNNING:
            self._scheduler.add_running(holder)
        source: list[int] = []
        target: list[int] = []
        for sequence in live[1:]:
            if not (self._scheduler.has_room(1) and self._blocks.can_fork(holder)):
                self._scheduler.add(sequence)
                continue
            copy = self._blocks.fork(holder, sequence)
            if copy is not None:
                source.append(copy[0])
                target.append(copy[1])
            self._scheduler.add_running(sequence)
        if source:
            self._model.cache.copy_blocks(source, target)

    def _end_sequence(self, sequence: Sequence) -> None:
        """One output is complete; with the last one the request is."""
        self._stepper.give_back(sequence)
        self._scheduler.remove(sequence)
        if sequence.request.finished:
            self._finish(sequence.request)

    def _finish(self, request: ActiveRequest) -> None:
        """All outputs are there."""
        self._remove_sequences(request)
        del self.open[request.key]
        if self._decodes:
            request.times.decode_s = request.close_stage(self._clock())
        worker = self._worker if self._decodes else ""
        output = result(request, self._model.tokenizer, decode_worker=worker)
        if self._keep_prompts:
            output.prompt_token_ids = request.prompt_token_ids
        self._out.finished.append(output)

    def _hand_off(
        self, request: ActiveRequest, tokens: list[SampledToken], outgoing: Outgoing
    ) -> None:
        """The prompt's blocks change from the sequence to the hand-off."""
        table = self._blocks.detach(request.sequences[0])
        self._remove_sequences(request)
        del self.open[request.key]
        self._out.prefilled.append(outgoing.pin(request, table, tokens))

    def _commit(self, sequence: Sequence) -> None:
        """A block is full of known tokens, one of which was pending when it was computed."""
        known = min(sequence.num_known_tokens, sequence.num_computed_tokens)
        self._blocks.commit(sequence, known)

    def _remove_sequences(self, request: ActiveRequest) -> None:
        """Take a request's sequences out of the scheduler and give their blocks back."""
        for sequence in request.sequences:
            if sequence.state is not SequenceState.FINISHED:
                self._stepper.give_back(sequence)
                self._scheduler.remove(sequence)
