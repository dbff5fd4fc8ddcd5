"""How KV lies in a block, and how two ends know that they mean the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from kvxfer.errors import LayoutMismatch


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """One block holds K and V of all layers for `block_size` tokens, in one contiguous piece.

    Bytes of a block, slowest first: layer, K then V, token, head, element (token-major).
    """

    model: str
    dtype: str
    itemsize: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name in ("itemsize", "block_size", "num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise LayoutMismatch(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize
        return self.block_size * per_token

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits; equal where KV of one end may be read by the other."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
