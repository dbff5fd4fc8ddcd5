"""The paged KV cache: one pool of blocks, each holding K and V of all layers in one piece.

Legend: N blocks, L layers, H KV heads, D head size, b tokens of a block; the 2 is K, V.
A block is contiguous ([L, 2, H, b, D]), so that a transfer moves few large pieces; a layer's
K or V is a strided view. Heads come before tokens: gathering a sequence's pages then brings
each head's keys together, and a rank that serves some of the heads finds them in one piece
for each layer. The pool lies in a buffer of the caller's (a region that
other processes read) or in memory of its own. Who may write a block is the block manager's
business; nothing here counts references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What one token leaves behind in a model's cache, and how many share a block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in all layers."""
        numbers = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return numbers * self.dtype.itemsize


class PagedKVCache:
    """The pool and its views.

    `buffer`, where given, is writable, at least `num_blocks * shape.block_bytes` long, and
    outlives the cache: host memory (a memoryview), or a flat tensor of bytes on `device`.
    Raises ValueError if the buffer is too small or on another device.
    """

    shape: KVShape
    num_blocks: int
    pool_NL2HbD: torch.Tensor

    def __init__(
        self,
        shape: KVShape,
        num_blocks: int,
        device: str | torch.device = "cpu",
        buffer: memoryview | torch.Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        per_layer = (2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        size = (num_blocks, shape.num_layers, *per_layer)
        if buffer is None:
            self.pool_NL2HbD = torch.zeros(size, dtype=shape.dtype, device=self.device)
        else:
            self.pool_NL2HbD = _over(buffer, shape, num_blocks, self.device).view(size)

    @property
    def pool(self) -> torch.Tensor:
        """[N, L, 2, H, b, D], contiguous."""
        return self.pool_NL2HbD

    @property
    def pages(self) -> torch.Tensor:
        """[N * L * 2 * H, b * D]: a row is K or V of one block, layer and head.

        Its index is `((block * L + layer) * 2 + kv) * H + head`, kv 0 for K and 1 for V.
        """
        return self.pool_NL2HbD.view(-1, self.shape.block_size * self.shape.head_dim)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [N, H, b, D], strided views."""
        return self.pool_NL2HbD[:, layer, 0], self.pool_NL2HbD[:, layer, 1]

    def copy_blocks(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy whole blocks, all layers; `src` and `dst` are equally long and disjoint."""
        if len(src) != len(dst):
            raise ValueError(f"{len(src)} source blocks for {len(dst)} destinations")
        for source, target in zip(src, dst, strict=True):
            self.pool_NL2HbD[target].copy_(self.pool_NL2HbD[source])

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Fill whole blocks with zeros, all layers."""
        for block in blocks:
            self.pool_NL2HbD[block].zero_()


def _over(
    buffer: memoryview | torch.Tensor, shape: KVShape, num_blocks: int, device: torch.device
) -> torch.Tensor:
    where = torch.device("cpu") if isinstance(buffer, memoryview) else buffer.device
    if where != device:
        raise ValueError(f"a buffer on {where} cannot hold a cache on {device}")
    need = num_blocks * shape.block_bytes
    if buffer.nbytes < need:
        raise ValueError(f"the buffer has {buffer.nbytes} bytes, {num_blocks} blocks need {need}")
    if isinstance(buffer, torch.Tensor):
        return buffer[:need].view(shape.dtype)
    return torch.frombuffer(buffer, dtype=shape.dtype, count=need // shape.dtype.itemsize)
