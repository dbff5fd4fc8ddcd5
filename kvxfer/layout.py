"""How KV lies in a block, and how two ends know that they mean the same.

One block holds K and V of all layers for `block_size` tokens, of the heads that its rank serves, in
one contiguous piece. Slowest first:

    head_major    layer, K then V, head, token, element
    token_major   layer, K then V, token, head, element

A plane is one layer's K or V; a row is one token's numbers of one head in a plane.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from kvxfer.errors import LayoutMismatch

Order = Literal["head_major", "token_major"]
_SIZES = ("itemsize", "block_size", "num_layers", "num_kv_heads", "head_dim", "tp_size")
_IN_COMMON = ("model", "dtype", "itemsize", "num_layers", "num_kv_heads", "head_dim", "order")


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """See the module. Raises LayoutMismatch for what cannot be."""

    model: str
    dtype: str
    itemsize: int
    """Bytes of an element."""
    block_size: int
    """Tokens of a block."""
    num_layers: int
    num_kv_heads: int
    """Of the model; a rank serves some of them, see `heads`."""
    head_dim: int
    """Elements of a row."""
    order: Order = "token_major"
    tp_size: int = 1
    """Ranks that share the model's heads."""
    tp_rank: int = 0

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise LayoutMismatch(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.order not in get_args(Order):
            raise LayoutMismatch(
                f"there is no order {self.order!r}: {' or '.join(get_args(Order))}"
            )
        if not 0 <= self.tp_rank < self.tp_size:
            raise LayoutMismatch(f"no rank {self.tp_rank} among {self.tp_size}")
        if self.num_kv_heads % self.tp_size and self.tp_size % self.num_kv_heads:
            raise LayoutMismatch(f"{self.tp_size} ranks cannot share {self.num_kv_heads} heads")

    @cached_property
    def heads(self) -> range:
        """The heads that this rank serves.

        Where there are more ranks than heads, neighbouring ranks serve the same one.
        """
        if self.tp_size > self.num_kv_heads:
            head = self.tp_rank // self.num_copies
            return range(head, head + 1)
        count = self.num_kv_heads // self.tp_size
        return range(self.tp_rank * count, (self.tp_rank + 1) * count)

    @property
    def num_copies(self) -> int:
        """Ranks that serve the same heads."""
        return max(1, self.tp_size // self.num_kv_heads)

    @property
    def num_planes(self) -> int:
        """K and V of all layers."""
        return 2 * self.num_layers

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one plane, of one head."""
        return self.head_dim * self.itemsize

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block of this rank."""
        return self.num_planes * len(self.heads) * self.block_size * self.row_bytes

    def offset(self, plane: int, head: int, token: int) -> int:
        """Where a row begins in a block; `head` is the model's number, one of `heads`."""
        of_rank = head - self.heads.start
        if self.order == "head_major":
            row = (plane * len(self.heads) + of_rank) * self.block_size + token
        else:
            row = (plane * self.block_size + token) * len(self.heads) + of_rank
        return row * self.row_bytes

    def of(self, *, block_size: int, tp_size: int, tp_rank: int) -> KVLayout:
        """The same KV in other blocks and on another rank."""
        return replace(self, block_size=block_size, tp_size=tp_size, tp_rank=tp_rank)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits; equal where KV of one end may be read by the other.

        Block size and ranks may differ: a reader takes what it needs.
        """
        values = {name: getattr(self, name) for name in _IN_COMMON}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
