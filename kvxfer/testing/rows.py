"""KV row by row, as slowly and plainly as it can be said: what clever copies are held against.

A row is one token's numbers of one head in one plane (K or V of a layer), named (plane, head,
token), all of them the model's numbers; blocks are put together from rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from kvxfer import KVLayout

Row = tuple[int, int, int]
FILLER = 0xEE


def random_rows(rng: random.Random, layout: KVLayout, num_tokens: int) -> dict[Row, bytes]:
    """Of all heads of the model."""
    return {
        (plane, head, token): rng.randbytes(layout.row_bytes)
        for plane in range(layout.num_planes)
        for head in range(layout.num_kv_heads)
        for token in range(num_tokens)
    }


def pack(layout: KVLayout, rows: Mapping[Row, bytes], index: int) -> bytes:
    """The block of this rank that begins at token `index * block_size`; filler where no row is."""
    filler = bytes([FILLER]) * layout.row_bytes
    return b"".join(rows.get(row, filler) for row in _rows_of(layout, index))


def _rows_of(layout: KVLayout, index: int) -> Iterator[Row]:
    """The rows of a block in the order of their bytes."""
    tokens = range(index * layout.block_size, (index + 1) * layout.block_size)
    for plane in range(2 * layout.num_layers):
        if layout.order == "head_major":
            for head in layout.heads:
                for token in tokens:
                    yield plane, head, token
        else:
            for token in tokens:
                for head in layout.heads:
                    yield plane, head, token
