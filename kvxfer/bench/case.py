"""What is moved: how much, in which blocks, from where to where."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property

from kvxfer.layout import KVLayout

MIB = 1 << 20
_LEAST_POOL_BYTES = 128 * MIB
_MOST_TABLES = 32
_UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30}


@dataclass(frozen=True)
class Case:
    """One size of transfer in one size of block, over `rounds` turns."""

    transfer_bytes: int
    block_bytes: int
    rounds: int

    @property
    def count(self) -> int:
        """Blocks of one transfer."""
        return max(1, round(self.transfer_bytes / self.block_bytes))

    @property
    def num_bytes(self) -> int:
        """Bytes of one transfer, in whole blocks."""
        return self.count * self.block_bytes

    @property
    def num_blocks(self) -> int:
        """Of a pool."""
        return max(2 * self.count, _LEAST_POOL_BYTES // self.block_bytes)

    @property
    def pool_bytes(self) -> int:
        """Of a pool."""
        return self.num_blocks * self.block_bytes

    @cached_property
    def tables(self) -> list[tuple[list[int], list[int]]]:
        """(source blocks, destination blocks) of each turn; then they come again."""
        rng, blocks = random.Random(1), range(self.num_blocks)
        turns = min(self.rounds, _MOST_TABLES)
        return [
            (rng.sample(blocks, self.count), rng.sample(blocks, self.count)) for _ in range(turns)
        ]

    @property
    def layout(self) -> KVLayout:
        """One whose blocks have so many bytes."""
        return KVLayout(
            model="bench",
            dtype="uint8",
            itemsize=1,
            block_size=1,
            num_layers=1,
            num_kv_heads=1,
            head_dim=self.block_bytes // 2,
        )

    def offset(self, turn: int) -> int:
        """Where a contiguous copy of that turn begins: through the pool from end to end."""
        return turn % max(1, self.pool_bytes // self.num_bytes) * self.num_bytes


def size_of(text: str) -> int:
    """Bytes: 65536, 64K, 64KiB, 1MiB. Raises ValueError."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not int(found[1]):
        raise ValueError(f"{text!r} is no size: say 64KiB or 1MiB")
    return int(found[1]) * _UNITS[found[2].upper()]


def size_text(num_bytes: int) -> str:
    """The shortest that is exact enough to read: 64 KiB, 1 MiB, 0.7 MiB."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes} B"
