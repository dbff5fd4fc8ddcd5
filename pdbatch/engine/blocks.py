"""The pool of physical blocks: free list, reference counts, and hashes of what is in them.

A block is in exactly one of three places:

    used     reference count above 0: it belongs to those who hold it (sequences, pins, pulls)
    cached   free, but its content has a hash and can be found again; least recently used first
    plain    free, and its content means nothing

    take     plain, else the oldest cached  ──► used, content void, generation bumped
    share    used or cached                 ──► used, content kept
    release  used ──► (last holder) cached if it has a hash, else plain

Ownership, as a half-open interval: [take or share, release) for each reference; nobody writes a
block that has two. `on_take` is called with block ids before they get new content, so that
a peer that still reads the old content can tell.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NewType

from pdbatch.errors import InvariantError

BlockId = NewType("BlockId", int)  # 0-based index into the KV pool
BlockHash = NewType("BlockHash", bytes)  # 128 bits over model layout and all tokens up to its end


class BlockPool:
    """Counts references of `num_blocks` blocks. Not safe for several threads."""

    def __init__(
        self, num_blocks: int, on_take: Callable[[Sequence[int]], None] | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self._on_take = on_take
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, BlockId] = {}
        self._plain: list[BlockId] = [BlockId(i) for i in reversed(range(num_blocks))]
        self._cached: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, cached ones included."""
        return len(self._plain) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can be found again."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[BlockId]:
        """Blocks for new content, one reference each. Raises InvariantError if too few are free.

        Callers ask `num_free` first: running out is a matter of scheduling, not an error.
        """
        if count > self.num_free:
            raise InvariantError(f"{count} blocks taken of {self.num_free} free")
        taken = []
        for _ in range(count):
            if self._plain:
                block = self._plain.pop()
            else:
                block, _none = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        if taken and self._on_take is not None:
            self._on_take(taken)
        return taken

    def share(self, blocks: Iterable[BlockId]) -> None:
        """One more reference to each; cached ones leave the free list."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One reference less to each; a block without any is free.

        The last block of the sequence counts as the least recently used, so that a prefix
        outlives what follows it.
        """
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left < 0:
                raise InvariantError(f"block {block} released with no reference")
            self._references[block] = left
            if left == 0:
                if self._hash_of[block] is None:
                    self._plain.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: BlockId, content: BlockHash) -> None:
        """This used block holds (or will, after this step) the content with that hash.

        The first block of a content keeps its name; a double stays without one.
        """
        if content not in self._block_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def find(self, content: BlockHash) -> BlockId | None:
        """A block that holds the content, used or cached."""
        return self._block_of.get(content)

    def is_free(self, block: BlockId) -> bool:
        """True if nobody holds it."""
        return self._references[block] == 0

    def forget(self, blocks: Iterable[BlockId]) -> None:
        """These used blocks' content cannot be found from now on."""
        for block in blocks:
            if self._references[block] == 0:
                raise InvariantError(f"block {block} is forgotten while nobody holds it")
            self._forget(block)

    def forget_all(self) -> None:
        """No content can be found from now on; used blocks stay used."""
        for block in list(self._block_of.values()):
            self._forget(block)
        self._plain.extend(self._cached)
        self._cached.clear()

    def check(self, held: Iterable[Sequence[BlockId]]) -> None:
        """Compare the accounts with all block tables that exist. Raises InvariantError.

        `free + cached + used == total`, references equal holders, names are one to one.
        """
        free, cached = len(self._plain), len(self._cached)
        used = sum(1 for count in self._references if count > 0)
        if free + cached + used != self.num_blocks:
            raise InvariantError(
                f"free {free} + cached {cached} + used {used} != total {self.num_blocks}"
            )
        holders = Counter(block for table in held for block in table)
        for block, count in enumerate(self._references):
            if holders[BlockId(block)] != count:
                raise InvariantError(
                    f"block {block} has {count} references and {holders[BlockId(block)]} holders"
                )
        if len(set(self._plain)) != free or not set(self._plain).isdisjoint(self._cached):
            raise InvariantError("a block is twice in the free list")
        self._check_names()

    def _check_names(self) -> None:
        named = {block: content for content, block in self._block_of.items()}
        for block, content in enumerate(self._hash_of):
            if named.get(BlockId(block)) != content:
                raise InvariantError(f"block {block} and its hash disagree")
        for block in self._cached:
            if self._hash_of[block] is None:
                raise InvariantError(f"block {block} is cached without a hash")

    def _forget(self, block: BlockId) -> None:
        content = self._hash_of[block]
        if content is not None:
            del self._block_of[content]
            self._hash_of[block] = None
