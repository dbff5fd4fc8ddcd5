"""Requests on their way in: claimed elsewhere, read here, decoded from then on.

Life of an adoption:

    1. `add`: the descriptor is decoded and proved; what cannot be used is answered at once.
    2. It waits for blocks and places. Preempted sequences go first; an adoption whose leading
       blocks another pull is just bringing waits for that one and then shares them.
    3. `start`: leading full blocks that are here already are shared, the others taken, and a
       thread reads into them. [taken, result) they belong to the pull: an abort waits for it.
    4. `collect`: proved KV makes the request run; anything else gives the blocks back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pdbatch.engine.blocks import BlockHash, BlockId
from pdbatch.engine.ports import Incoming, PullResult, Transfers
from pdbatch.engine.scheduler import Scheduler
from pdbatch.engine.sequence import ActiveRequest, Sequence


@dataclass(slots=True)
class Pull:
    """One adoption, waiting or being read."""

    incoming: Incoming
    request: ActiveRequest
    arriving: list[BlockHash] = field(default_factory=list)
    """Full blocks that this pull brings."""
    dropped: bool = False
    """Aborted while being read: its blocks go back as soon as the read has ended."""

    @property
    def lead(self) -> Sequence:
        """The sequence whose block table is read into."""
        return self.request.sequences[0]


class Adoptions:
    """Waiting adoptions and pulls under way."""

    def __init__(self, transfers: Transfers, scheduler: Scheduler) -> None:
        self._transfers = transfers
        self._scheduler = scheduler
        self._blocks = scheduler.blocks
        self._waiting: deque[Pull] = deque()
        self._pulling: dict[str, Pull] = {}
        self._arriving: set[BlockHash] = set()
        self._here: list[PullResult] = []
        """Adoptions that needed no read: all their blocks were found."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._pulling)

    @property
    def tables(self) -> list[list[BlockId]]:
        """Block tables that pulls own."""
        return [pull.lead.block_table for pull in self._pulling.values()]

    def add(self, incoming: Incoming, request: ActiveRequest) -> None:
        """A proved descriptor waits for room."""
        self._waiting.append(Pull(incoming, request))

    def start(self) -> int:
        """Begin the reads that have room; how many began."""
        if not self._waiting or self._scheduler.num_waiting or self._scheduler.is_held:
            return 0
        may = self._scheduler.foresight([pull.lead for pull in self._pulling.values()])
        started, kept = 0, deque[Pull]()
        while self._waiting:
            pull = self._waiting[0]
            if not self._has_place(pull):
                break
            found = self._blocks.find_prompt(pull.lead)
            missing = self._blocks.prompt_hashes(pull.lead)[len(found) :]
            again = pull.incoming.handoff_id in self._pulling  # a dropped read is not over yet
            if again or (missing and missing[0] in self._arriving):
                kept.append(self._waiting.popleft())
                continue
            lead = pull.lead
            if not self._blocks.take_after(
                lead, found, lead.num_prompt_tokens, self._scheduler.reserve, may
            ):
                break
            self._waiting.popleft()
            self._begin(pull, len(found), missing)
            started += 1
        self._waiting.extendleft(reversed(kept))
        return started

    def collect(self) -> list[tuple[Pull, PullResult]]:
        """Pulls that ended; the KV of the good ones is computed for their lead sequence."""
        results, self._here = self._here + self._transfers.finished_pulls(), []
        ended = []
        for result in results:
            pull = self._pulling.pop(result.handoff_id)
            self._arriving.difference_update(pull.arriving)
            lead = pull.lead
            if result.code is None and not pull.dropped:
                lead.num_computed_tokens = lead.num_prompt_tokens
                self._blocks.commit(lead, lead.num_prompt_tokens)
            else:
                self._blocks.free(lead)
            ended.append((pull, result))
        return ended

    def drop(self, key: str) -> list[Pull]:
        """Abort the adoptions of a request; those being read give their blocks back later."""
        waiting = [pull for pull in self._waiting if pull.request.key == key]
        for pull in waiting:
            self._waiting.remove(pull)
        reading = [p for p in self._pulling.values() if p.request.key == key and not p.dropped]
        for pull in reading:
            pull.dropped = True
        return waiting + reading

    def drop_waiting(self) -> list[Pull]:
        """Abort every adoption that is not being read yet."""
        dropped = list(self._waiting)
        self._waiting.clear()
        return dropped

    def drop_all(self) -> list[Pull]:
        """Abort every adoption."""
        reading = [pull for pull in self._pulling.values() if not pull.dropped]
        for pull in reading:
            pull.dropped = True
        return self.drop_waiting() + reading

    def _has_place(self, pull: Pull) -> bool:
        coming = sum(other.request.params.n for other in self._pulling.values())
        if self._scheduler.has_room(coming + pull.request.params.n):
            return True
        return not self._pulling and not self._scheduler.running  # n is above max_num_seqs

    def _begin(self, pull: Pull, found: int, missing: list[BlockHash]) -> None:
        pull.arriving = missing if self._blocks.prefix_caching else []
        self._arriving.update(pull.arriving)
        handoff_id = pull.incoming.handoff_id
        self._pulling[handoff_id] = pull
        if found == len(pull.lead.block_table):
            self._here.append(PullResult(handoff_id))
        else:
            self._transfers.start_pull(pull.incoming, pull.lead.block_table, found)
