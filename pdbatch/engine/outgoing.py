"""Prefilled requests on their way out: pinned, offered to peers, and counted.

[pin, unpin) the block tables belong to `Outgoing`; their content stays as it is for peers to read.
After that the blocks are free, and a peer that still reads finds other generations once they
have been taken for something else.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import dataclass

from pdbatch.engine.blocks import BlockId, BlockPool
from pdbatch.engine.messages import Handoff
from pdbatch.engine.model_input import SampledToken
from pdbatch.engine.payload import HandoffPayload, first_token, pack_tokens
from pdbatch.engine.ports import Transfers
from pdbatch.engine.sequence import ActiveRequest


@dataclass(frozen=True, slots=True)
class Pin:
    """One prefilled request."""

    key: str
    table: list[BlockId]


class Outgoing:
    """Owns the references of pinned block tables."""

    def __init__(self, transfers: Transfers, pool: BlockPool, worker: str) -> None:
        self._transfers = transfers
        self._pool = pool
        self._worker = worker
        self._pins: dict[str, Pin] = {}
        self._of_key: dict[str, set[str]] = {}
        self._references: Counter[BlockId] = Counter()
        self._life = secrets.token_hex(4)
        """Keeps hand-off ids of two lives of one worker apart."""
        self._count = 0

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def num_blocks(self) -> int:
        """Different blocks that are pinned."""
        return len(self._references)

    @property
    def tables(self) -> list[list[BlockId]]:
        """Pinned block tables."""
        return [pin.table for pin in self._pins.values()]

    def pin(
        self, request: ActiveRequest, table: list[BlockId], tokens: list[SampledToken]
    ) -> Handoff:
        """Take over the prompt's blocks and offer them, with the first token of each output."""
        self._count += 1
        handoff_id = f"{request.key}/{self._life}{self._count:x}"
        self._pins[handoff_id] = Pin(request.key, table)
        self._of_key.setdefault(request.key, set()).add(handoff_id)
        self._references.update(table)
        payload = HandoffPayload(
            key=request.key,
            prompt=pack_tokens(request.prompt_token_ids),
            sampling=request.params,
            seed=request.seed,
            first=[first_token(token) for token in tokens],
            priority=request.priority,
            cached_tokens=request.num_cached_tokens,
            times=request.times,
            prefill_worker=self._worker,
            pinned_at=time.time(),
        )
        return self._transfers.pin(handoff_id, table, request.prompt_token_ids, payload)

    def unpin(self, handoff_id: str) -> None:
        """Stop offering and give the blocks back; unknown hand-offs are ignored."""
        pin = self._pins.pop(handoff_id, None)
        if pin is None:
            return
        self._transfers.unpin(handoff_id)
        others = self._of_key[pin.key]
        others.discard(handoff_id)
        if not others:
            del self._of_key[pin.key]
        for block in pin.table:
            self._references[block] -= 1
            if not self._references[block]:
                del self._references[block]
        self._pool.release(pin.table)

    def unpin_key(self, key: str) -> None:
        """Unpin all hand-offs of a request."""
        for handoff_id in sorted(self._of_key.get(key, ())):
            self.unpin(handoff_id)

    def unpin_all(self) -> None:
        """Unpin everything."""
        for handoff_id in list(self._pins):
            self.unpin(handoff_id)
