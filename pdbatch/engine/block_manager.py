"""Blocks of sequences: found in the prefix cache, taken, grown, forked and given back.

Contract, for the scheduler and for adoptions:

    admit      a waiting sequence gets blocks for all its known tokens, or nothing happens
    grow       a running sequence gets the block that its next token needs, or nothing happens
    commit     called when tokens are scheduled, or become known after that: full blocks can be
               found from now on
    uncommit   they were not computed after all: what was committed for them is not found
    fork       a second output shares the first one's full blocks and gets a copy of the last
    free       everything goes back; what is full can still be found

Blocks that are found by a sequence of the same step as the one that fills them are sound: in each
layer the runner writes K and V of all the step's tokens before any token attends.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from pdbatch.engine.block_hashes import BlockHasher
from pdbatch.engine.blocks import BlockHash, BlockId, BlockPool
from pdbatch.engine.sequence import Sequence

MayTake = Callable[[Sequence, int], bool]
"""Whether a sequence may start that takes so many free blocks."""


class BlockManager:
    """Operations on sequences' block tables over one pool."""

    def __init__(
        self, pool: BlockPool, block_size: int, *, prefix_caching: bool = True, root: bytes = b""
    ) -> None:
        """`root` begins every hash: the model and the layout, so that nothing else can be found."""
        self.pool = pool
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._hasher = BlockHasher(block_size, root)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-num_tokens // self.block_size)

    def admit(self, sequence: Sequence, reserve: int = 0, may: MayTake | None = None) -> bool:
        """Give a sequence without blocks those of all its known tokens.

        Found leading blocks count as computed, but for the last known token, which always runs.
        False, and nothing changed, if fewer than `reserve` blocks would be free afterwards, or if
        `may` forbids it.
        """
        found = self._find(sequence, sequence.num_tokens - 1)
        if not self.take_after(sequence, found, sequence.num_tokens, reserve, may):
            return False
        sequence.num_computed_tokens = len(found) * self.block_size
        return True

    def prepare(self, sequence: Sequence) -> None:
        """Hash a waiting sequence's full blocks, as `admit` would."""
        if self.prefix_caching:
            self._hashes(sequence, (sequence.num_known_tokens - 1) // self.block_size)

    def find_prompt(self, sequence: Sequence) -> list[BlockId]:
        """Blocks that hold leading full blocks of the prompt, the very last one too."""
        return self._find(sequence, sequence.num_prompt_tokens)

    def prompt_hashes(self, sequence: Sequence) -> list[BlockHash]:
        """Hashes of the prompt's full blocks; none without prefix caching."""
        if not self.prefix_caching:
            return []
        return self._hashes(sequence, sequence.num_prompt_tokens // self.block_size)

    def take_after(
        self,
        sequence: Sequence,
        found: list[BlockId],
        num_tokens: int,
        reserve: int = 0,
        may: MayTake | None = None,
    ) -> bool:
        """Set the block table to `found` and new blocks up to `num_tokens`, if there is room."""
        pool = self.pool
        fresh = self.blocks_for(num_tokens) - len(found)
        taken = fresh + sum(map(pool.is_free, found))
        if taken + reserve > pool.num_free or (may is not None and not may(sequence, taken)):
            return False
        pool.share(found)
        sequence.block_table = found + pool.take(fresh)
        sequence.num_registered_blocks = len(found)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all known tokens of a running sequence; False if no block is free."""
        if sequence.num_tokens <= len(sequence.block_table) * self.block_size:
            return True
        if self.pool.num_free == 0:
            return False
        sequence.block_table += self.pool.take(1)
        return True

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` tokens are in the blocks, or will be after this step."""
        full = num_tokens // self.block_size
        first = sequence.num_registered_blocks
        if full <= first or not self.prefix_caching:
            return
        hashes = self._hashes(sequence, full)
        for at in range(first, full):
            self.pool.register(sequence.block_table[at], hashes[at])
        sequence.num_registered_blocks = full

    def uncommit(self, sequence: Sequence) -> None:
        """What lies behind the computed tokens was not written: it cannot be found any more."""
        full = sequence.num_computed_tokens // self.block_size
        self.pool.forget(sequence.block_table[full:])
        sequence.num_registered_blocks = min(sequence.num_registered_blocks, full)

    def fork(self, parent: Sequence, child: Sequence) -> tuple[BlockId, BlockId] | None:
        """Give `child` the KV that `parent` has computed; what is to be copied (from, to).

        Both have equal first `num_computed_tokens` tokens. Raises InvariantError without a free
        block where one is needed (`can_fork`). None: nothing is to be copied.
        """
        full, rest = divmod(parent.num_computed_tokens, self.block_size)
        shared = parent.block_table[:full]
        self.pool.share(shared)
        child.block_hashes = parent.block_hashes[:full]
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_registered_blocks = min(full, parent.num_registered_blocks)
        child.block_table = shared
        if rest == 0:
            return None
        (own,) = self.pool.take(1)
        child.block_table = [*shared, own]
        return parent.block_table[full], own

    def can_fork(self, parent: Sequence) -> bool:
        """Whether a fork of `parent` finds the block that it needs."""
        return parent.num_computed_tokens % self.block_size == 0 or self.pool.num_free > 0

    def move(self, source: Sequence, target: Sequence) -> None:
        """`target` takes over the blocks of `source`, which has no use for them any more."""
        target.block_hashes = source.block_hashes
        target.num_computed_tokens = source.num_computed_tokens
        target.num_registered_blocks = source.num_registered_blocks
        target.block_table = self.detach(source)

    def free(self, sequence: Sequence) -> None:
        """Give all blocks of a sequence back; none of its tokens are computed any more."""
        self.pool.release(sequence.block_table)
        self.detach(sequence)

    def detach(self, sequence: Sequence) -> list[BlockId]:
        """Take the block table off a sequence without releasing: its new owner will."""
        table, sequence.block_table = sequence.block_table, []
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        return table

    def check(self, tables: SequenceOf[SequenceOf[BlockId]]) -> None:
        """Compare the pool's accounts with all block tables. Raises InvariantError."""
        self.pool.check(tables)

    def _find(self, sequence: Sequence, num_tokens: int) -> list[BlockId]:
        found: list[BlockId] = []
        if self.prefix_caching:
            count = num_tokens // self.block_size
            for content in self._hashes(sequence, count)[:count]:
                block = self.pool.find(content)
                if block is None:
                    break
                found.append(block)
        return found

    def _hashes(self, sequence: Sequence, count: int) -> list[BlockHash]:
        """Of at least the first `count` blocks, which are full of known tokens."""
        hashes = sequence.block_hashes
        known = len(hashes)
        if known < count:
            size = self.block_size
            self._hasher.extend(hashes, sequence.tokens(known * size, count * size))
        return hashes
