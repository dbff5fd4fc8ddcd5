"""A step between its launch and its retirement.

    launched    its kernels are queued, its tokens are named by the next step, not known here
    retired     all of it is over on the device, its tokens are here and are appended; who ended
                by them gives blocks back

At most one step is in flight while another is put together (`engine.Engine`). A sequence that
is found to have ended, though the step in flight has it already, leaves its blocks with that
step: [ended, that step's retirement) they are the flight's, since the device may still write
the token too many into them. That token is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdbatch.engine.blocks import BlockId
from pdbatch.engine.fences import Wait
from pdbatch.engine.ports import Choice
from pdbatch.engine.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Flight:
    """One step that was launched."""

    sequences: list[Sequence]
    """In the order of the batch, and"""
    counts: list[int]
    """how many tokens of each."""
    owners: list[Sequence]
    """Whose tokens the step chooses, in the order of the choice's rows."""
    choice: Choice | None
    """None for chunks alone."""
    launched_at_s: float
    """Monotonic seconds at which it began to be put together."""
    settled: Wait
    """Returns when all that it launched is over on the device."""
    tables: list[list[BlockId]] = field(default_factory=list)
    """Of sequences that have ended since."""
    void: set[Sequence] = field(default_factory=set)
    """Sequences that it ran with a wrong guess of the token before: theirs are nobody's."""

    @property
    def reads_outputs(self) -> bool:
        """True if some sequence of it cannot go on before its token is known here."""
        return any(owner.reads_outputs for owner in self.owners)

    @property
    def alive(self) -> bool:
        """False if all its sequences have ended: nobody waits for its tokens."""
        return any(sequence.state is not SequenceState.FINISHED for sequence in self.sequences)
