"""Rank 0's hand-off: each rank offers and reads its part of every block, rank 0 joins them.

A pull is over when it is over on all ranks; it is good if it is good on all. Producer and reader
may have different numbers of ranks: `kvxfer.geometry` finds whose heads a rank needs.
"""

from __future__ import annotations

import select
from collections.abc import Sequence

from pdbatch.engine.handoff import KVTransfers, joined_handoff
from pdbatch.engine.messages import Adoption, Handoff
from pdbatch.engine.parallel.messages import NewLife, Pin, Pull, PullEnded, Unpin
from pdbatch.engine.parallel.team import Team
from pdbatch.engine.payload import HandoffPayload, encode_payload
from pdbatch.engine.ports import Incoming, PullResult


class ParallelTransfers:
    """A `Transfers` over the parts of all ranks. Owns rank 0's."""

    def __init__(self, own: KVTransfers, team: Team) -> None:
        self._own = own
        self._team = team
        self._results: dict[str, list[PullResult]] = {}
        self._poll = select.epoll()
        for fileno in [own.fileno(), *team.filenos()]:
            self._poll.register(fileno, select.EPOLLIN)

    @property
    def transports(self) -> list[str]:
        """As rank 0 has them."""
        return self._own.transports

    def pin(
        self, handoff_id: str, blocks: Sequence[int], prompt: list[int], payload: HandoffPayload
    ) -> Handoff:
        """Offer all ranks' parts of these blocks until `unpin`."""
        self._team.tell(Pin(handoff_id=handoff_id, blocks=list(blocks), prompt=prompt))
        mine = self._own.describe(handoff_id, blocks, prompt, encode_payload(payload))
        return joined_handoff(payload.key, mine, self._team.pinned())

    def unpin(self, handoff_id: str) -> None:
        """Stop offering."""
        self._team.tell(Unpin(handoff_id=handoff_id))
        self._own.unpin(handoff_id)

    def read(self, adoption: Adoption) -> Incoming:
        """Decode and prove a descriptor. Raises PullRefused."""
        return self._own.read(adoption)

    def start_pull(self, incoming: Incoming, blocks: Sequence[int], skip: int) -> None:
        """Every rank begins to read its part."""
        self._results[incoming.handoff_id] = []
        order = Pull(
            handoff_id=incoming.handoff_id,
            descriptor=incoming.descriptor.to_json(),
            blocks=list(blocks),
            skip=skip,
        )
        self._team.tell(order)
        self._own.start_pull(incoming, blocks, skip)

    def finished_pulls(self) -> list[PullResult]:
        """Pulls that ended on all ranks since the last call; never waits."""
        parts = self._own.finished_pulls()
        parts += [result_of(ended) for ended in self._team.pulls_ended()]
        over = []
        for part in parts:
            found = self._results[part.handoff_id]
            found.append(part)
            if len(found) == self._team.group.size:
                over.append(_whole(self._results.pop(part.handoff_id)))
        return over

    def reset(self, epoch: int) -> None:
        """All ranks go on under a new epoch."""
        self._team.tell(NewLife(epoch=epoch))
        self._own.reset(epoch)

    def fileno(self) -> int:
        """Readable when a part of a pull has ended somewhere."""
        return self._poll.fileno()

    def close(self) -> None:
        """Stop serving here; the team's ranks stop when they end."""
        self._poll.close()
        self._own.close()


def answer_of(result: PullResult) -> PullEnded:
    """A rank's result on its way."""
    return PullEnded(
        handoff_id=result.handoff_id,
        num_bytes=result.num_bytes,
        seconds=result.seconds,
        transport=result.transport,
        code=result.code,
        message=result.message,
    )


def result_of(ended: PullEnded) -> PullResult:
    """A rank's result as it was."""
    return PullResult(
        ended.handoff_id,
        ended.num_bytes,
        ended.seconds,
        ended.transport,
        ended.code,
        ended.message,
    )


def _whole(parts: list[PullResult]) -> PullResult:
    """How a pull ended whose parts ended so: the first failure, else all their bytes."""
    for part in parts:
        if part.code is not None:
            return part
    names = dict.fromkeys(name for part in parts for name in part.transport.split(","))
    return PullResult(
        parts[0].handoff_id,
        sum(part.num_bytes for part in parts),
        max(part.seconds for part in parts),
        ",".join(names),
    )
