"""Names of full blocks: equal hashes mean equal tokens, from the sequence's first on."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b

from pdbatch.engine.blocks import BlockHash

_TOKEN_BYTES = 4


class BlockHasher:
    """Hashes block after block; what a prompt has in common with the one before is looked up.

    A hash is 128 bits of blake2b over the hash before it (`root`, the model's layout, before the
    first) and the block's tokens. Prompts of a job often begin alike, and comparing two beginnings
    costs a tenth of hashing one.
    """

    def __init__(self, block_size: int, root: bytes) -> None:
        self._block_bytes = block_size * _TOKEN_BYTES
        self._root = root
        self._last_data = b""
        self._last_hashes: list[BlockHash] = []

    def extend(self, hashes: list[BlockHash], tokens: Sequence[int]) -> None:
        """Append those of the blocks after `hashes`, which are full of `tokens`."""
        size, data = self._block_bytes, array("I", tokens).tobytes()
        done, is_start = 0, not hashes
        if is_start:
            done = self._num_common(data)
            hashes += self._last_hashes[:done]
        parent = hashes[-1] if hashes else self._root
        for start in range(done * size, len(data), size):
            digest = blake2b(parent + data[start : start + size], digest_size=16).digest()
            parent = BlockHash(digest)
            hashes.append(parent)
        if is_start:
            self._last_data, self._last_hashes = data, hashes.copy()

    def _num_common(self, data: bytes) -> int:
        """Leading blocks that this prompt and the last one have in common."""
        size, last = self._block_bytes, self._last_data
        if data[:size] != last[:size]:
            return 0
        most = min(len(data), len(last)) // size
        return bisect_left(
            range(most), True, key=lambda at: data[: (at + 1) * size] != last[: (at + 1) * size]
        )
