"""What running sequences are going to need, so that no more start than can end.

A sequence starts with blocks for the tokens that it has, and grows until it ends. Where as many
start as find blocks now, some must be preempted later and computed again. So one starts only if
the pool, as far as can be told, holds all of them at the moment when they are largest together:

    blocks │      ╭╮ ╭╮
           │   ╭──╯╰─╯╰╮      each grows by a block every `block_size` steps, and gives all
           │ ──╯       ╰──    back at its end; a peak lies right before an end
           └───────────────── steps

How long an output becomes is known where nothing but `max_tokens` ends it. Elsewhere lengths are
dealt out as those that ended before were spread (`OutputLengths`): with the mean for each, all
would seem to end at once, at a peak that never comes. Who turns out longer is preempted as ever.

Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025.
There lengths are drawn from those of recent requests; here a rate of ending is kept for each age,
since then outputs that still run count as well, and those that have ended first mislead nobody.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.sequence import Sequence

Numbers = NDArray[np.float64]

_EDGES = np.concatenate([[0.0], 128.0 * 2.0 ** (np.arange(32) / 2)])
"""Ages in tokens between which the rate of ending is taken as constant."""
_WIDTHS = np.diff(_EDGES)
_GOLDEN = (5**0.5 - 1) / 2
_MOST_ENDS = 4096
"""When so many have ended, all that was seen counts half: jobs follow each other."""


class OutputLengths:
    """How long outputs become, from the ages at which others ended.

    Before anything was seen, of those that reach an edge half are taken to end before the next.
    """

    def __init__(self) -> None:
        self._ends = np.ones(len(_WIDTHS))
        self._tokens = _WIDTHS / np.log(2)
        """Generated at each age, by outputs that have ended."""

    def ended(self, num_tokens: int, *, by_itself: bool) -> None:
        """An output of so many tokens is complete; not `by_itself`: `max_tokens` cut it off."""
        self._tokens += np.clip(num_tokens - _EDGES[:-1], 0, _WIDTHS)
        if by_itself:
            self._ends[np.searchsorted(_EDGES, num_tokens) - 1] += 1
            if self._ends.sum() > _MOST_ENDS:
                self._ends /= 2
                self._tokens /= 2

    def survival(self, ages: Numbers) -> Survival:
        """By what was seen; `ages` are those of outputs that still run."""
        lived = np.clip(ages[:, None] - _EDGES[:-1], 0, _WIDTHS).sum(axis=0)
        return Survival(self._ends / (self._tokens + lived))


class Survival:
    """Outputs that end at these rates, one for each span of ages."""

    def __init__(self, rates: Numbers) -> None:
        self._ending = np.concatenate([[0.0], np.cumsum(rates * _WIDTHS)])
        """Minus the logarithm of the share that reaches each edge."""

    def left(self, ages: Numbers, most: Numbers, shares: Numbers) -> Numbers:
        """Tokens that outputs of these ages still get if, of their like, such a share (0 to 1) ends
        sooner; at least one, at most `most`."""
        ending = np.interp(ages, _EDGES, self._ending) - np.log1p(-shares)
        found: Numbers = np.interp(ending, self._ending, _EDGES) - ages
        return np.minimum(np.maximum(found, 1.0), most)


class Room:
    """The pool over the steps to come, while it is chosen who starts."""

    def __init__(
        self, blocks: BlockManager, lengths: OutputLengths, running: Iterable[Sequence]
    ) -> None:
        """`running` also names those whose blocks are being filled from elsewhere."""
        self._blocks = blocks
        own: list[int] = []
        ages: list[int] = []
        most: list[int] = []
        known: list[bool] = []
        for sequence in running:
            held = max(0, len(sequence.block_table) - _shared(sequence) // blocks.block_size)
            chosen = _chosen(sequence)
            for _ in range(_outputs(sequence)):
                own.append(held)
                ages.append(chosen)
                most.append(sequence.request.max_tokens - chosen)
                known.append(_is_known(sequence))
                held = 1
        ages_S = np.array(ages, dtype=np.float64)
        left_S = np.maximum(np.array(most, dtype=np.float64), 0.0)
        open_S = ~np.array(known, dtype=np.bool_)
        self._survival = lengths.survival(ages_S[open_S])
        shares_S = _shares(0, len(own))
        left_S[open_S] = self._survival.left(ages_S[open_S], left_S[open_S], shares_S[open_S])
        self._own, self._left = own, left_S.tolist()
        self._growth = float(left_S.sum())

    def takes(self, sequence: Sequence, fresh: int, reserve: int) -> bool:
        """Whether one more may start that takes `fresh` free blocks now; it is counted then.

        All but `reserve` blocks may be used. The first always may.
        """
        outputs = _outputs(sequence)
        new = self._left_of(sequence, outputs)
        own = self._own + [fresh] + [1] * (outputs - 1)
        left, growth = self._left + new, self._growth + sum(new)
        free = self._blocks.pool.num_free - fresh - reserve
        size = self._blocks.block_size
        if self._own and growth > free * size and _peak(own, left, size) > free:
            return False
        self._own, self._left, self._growth = own, left, growth
        return True

    def _left_of(self, sequence: Sequence, outputs: int) -> list[float]:
        """Tokens that each of its outputs will grow by."""
        chosen = _chosen(sequence)
        most = np.full(outputs, max(0.0, sequence.request.max_tokens - chosen))
        if not _is_known(sequence):
            ages = np.full(outputs, float(chosen))
            most = self._survival.left(ages, most, _shares(len(self._own), outputs))
        found: list[float] = most.tolist()
        return found


def _shares(first: int, count: int) -> Numbers:
    """Even between 0 and 1, whatever the count: the multiples of the golden ratio from here on."""
    turns: Numbers = np.arange(first + 1, first + count + 1, dtype=np.float64)
    return turns * _GOLDEN % 1.0


def _peak(own: list[int], left: list[float], block_size: int) -> float:
    """Blocks that sequences will have at most, beyond what they have: they hold `own` blocks that
    nobody shares and grow by `left` tokens."""
    left_S = np.array(left)
    order = np.argsort(left_S)
    own_S = np.array(own, dtype=np.float64)[order]
    freed = np.cumsum(own_S) - own_S
    alive = np.arange(len(order), 0, -1)
    return float((alive * left_S[order] / block_size - freed).max())


def _chosen(sequence: Sequence) -> int:
    """Its output tokens, pending ones too."""
    return sequence.num_tokens - sequence.num_prompt_tokens


def _shared(sequence: Sequence) -> int:
    """Tokens that others have too: what was found, and of forks the whole prompt."""
    request = sequence.request
    return request.num_cached_tokens if sequence.index == 0 else request.num_prompt_tokens


def _outputs(sequence: Sequence) -> int:
    """With those that are still to fork from it."""
    return sequence.request.params.n if _chosen(sequence) == sequence.index == 0 else 1


def _is_known(sequence: Sequence) -> bool:
    """Whether nothing but its length ends it."""
    return not sequence.sampling.stop_token_ids and not sequence.request.params.stop
