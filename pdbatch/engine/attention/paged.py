"""Attention over the paged cache in plain torch operations, on any device.

Legend: T tokens of the step, H KV heads, G query heads of each KV head, D head size,
S sequences of a group, q and c queries and keys of one chunk.

The pages that a part of the step reads are gathered into one contiguous buffer (a page
holds one head's tokens of one block, so the gather also brings each head's keys together),
and the query heads that share a KV head are rows of one product. Nothing is repeated.

What lies in a block beyond its sequence's tokens is read, and masked: it must be finite.
`start_blocks` sees to that by clearing a block when its first token is about to be written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pdbatch.engine.attention import plan as plans
from pdbatch.engine.kvcache import PagedKVCache
from pdbatch.engine.model_input import ModelInput

_TILE = 128
"""Queries of a chunk whose scores are held at once where no fused kernel serves."""
_TORN_ROWS = 32
"""CUDA's fused kernel with a mask takes queries in tiles of 64 (or 32) rows, and where one row is
left for the last tile it gives that row a wrong mask (seen with torch 2.11): one row is added."""
_TILED_PAIRS = 16384
"""Queries times keys from which tiles are faster than the fused kernel (half precision, CPU)."""


class Workspace:
    """Memory for gathered pages, kept from step to step: fresh pages of memory cost time."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def take(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """[rows, width of `like`], contents undefined, valid until the next call."""
        need = rows * like.shape[1]
        if self._buffer is None or self._buffer.numel() < need:
            self._buffer = like.new_empty(need + need // 4)
        return self._buffer[:need].view(rows, like.shape[1])


class PagedStep:
    """A `StepAttention` over one cache; built for one step."""

    place = -1

    def __init__(self, cache: PagedKVCache, batch: ModelInput, workspace: Workspace) -> None:
        self._cache = cache
        self._batch = batch
        self._workspace = workspace
        self._plans: dict[int | None, plans.Plan] = {}
        self._rows_TH = _rows(cache, batch.slot_mapping_T)

    def attend(
        self,
        layer: int,
        q_HTD: torch.Tensor,
        k_HTD: torch.Tensor,
        v_HTD: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        self._write(layer, k_HTD, v_HTD)
        if window not in self._plans:
            self._plans[window] = plans.build(self._batch, self._cache, window)
        plan = self._plans[window]
        heads, size = k_HTD.shape[0], q_HTD.shape[2]
        q_HGTD = q_HTD.view(heads, -1, *q_HTD.shape[1:])
        out_THGD = q_HTD.new_empty(q_HTD.shape[1], *q_HGTD.shape[:2], size)
        for group in plan.groups:
            self._decode(layer, group, q_HGTD, out_THGD, scaling, softcap)
        for chunk in plan.chunks:
            q_HGqD = q_HGTD[:, :, chunk.start : chunk.end]
            if chunk.pages_2HM is None:
                k_HcD = k_HTD[:, chunk.start : chunk.end]
                v_HcD = v_HTD[:, chunk.start : chunk.end]
            else:
                found = self._gather(layer, chunk.pages_2HM).view(2, heads, -1, size)
                k_HcD, v_HcD = found[:, :, : chunk.num_keys].unbind(0)
            out_HGqD = chunk_attention(q_HGqD, k_HcD, v_HcD, chunk.mask_qc, scaling, softcap)
            out_THGD[chunk.start : chunk.end] = out_HGqD.permute(2, 0, 1, 3)
        return out_THGD.flatten(1, 2)

    def _write(self, layer: int, k_HTD: torch.Tensor, v_HTD: torch.Tensor) -> None:
        shape = self._cache.shape
        tokens = self._cache.pool.view(-1, shape.head_dim)
        per_kv = shape.num_kv_heads * shape.block_size
        for kv, new_HTD in enumerate((k_HTD, v_HTD)):
            rows_TH = self._rows_TH + (layer * 2 + kv) * per_kv
            tokens.index_copy_(0, rows_TH, new_HTD.transpose(0, 1).reshape(-1, shape.head_dim))

    def _gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """These pages' numbers, [pages * tokens, D], until the next call."""
        shape = self._cache.shape
        source = self._cache.pages
        out = self._workspace.take(pages.numel(), source)
        torch.index_select(source, 0, pages + layer * 2 * shape.num_kv_heads, out=out)
        return out.view(-1, shape.head_dim)

    def _decode(
        self,
        layer: int,
        group: plans.DecodeGroup,
        q_HGTD: torch.Tensor,
        out_THGD: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None:
        count = self._batch.num_decodes
        q_HSGD = q_HGTD[:, :, :count].transpose(1, 2)
        if group.rows_S is not None:
            q_HSGD = q_HSGD.index_select(1, group.rows_S)
        heads, size = q_HSGD.shape[0], q_HSGD.shape[3]
        found = self._gather(layer, group.pages)
        shared = found[: 2 * heads * group.num_shared].view(2, heads, -1, size)
        own = found[2 * heads * group.num_shared :].view(2, heads * group.num_seqs, -1, size)
        out_HSGD = decode_attention(q_HSGD, shared, own, group.mask_HS1C, scaling, softcap)
        out_SHGD = out_HSGD.transpose(0, 1)
        if group.rows_S is None:
            out_THGD[:count] = out_SHGD
        else:
            out_THGD.index_copy_(0, group.rows_S, out_SHGD)


def start_blocks(cache: PagedKVCache, slot_mapping_T: torch.Tensor) -> None:
    """Clear the blocks whose first token this step writes: no old number is read there."""
    size = cache.shape.block_size
    blocks = slot_mapping_T[slot_mapping_T % size == 0] // size
    if blocks.numel():
        cache.clear_blocks(blocks.tolist())


def decode_attention(
    q_HSGD: torch.Tensor,
    shared_2HpD: torch.Tensor,
    own_2PcD: torch.Tensor,
    mask_HS1C: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """One query a sequence, over keys that all share (maybe none) and then its own.

    `own` is [2, H * S, c, D]. Each KV head's queries of the whole group are the rows of one
    product with the shared keys; one softmax spans both. Gives [H, S, G, D].
    """
    q = q_HSGD.flatten(0, 1)
    scores = _scores(q, own_2PcD[0], scaling, softcap, mask_HS1C)
    p = shared_2HpD.shape[2]
    if not p:
        probs = torch.softmax(scores, -1).to(q.dtype)
        return torch.bmm(probs, own_2PcD[1]).view(q_HSGD.shape)
    first = _scores(q_HSGD.flatten(1, 2), shared_2HpD[0], scaling, softcap)
    rows = q_HSGD.shape[:3]
    both = torch.cat([first.view(*rows, p), scores.view(*rows, -1)], -1)
    probs_HSGc = torch.softmax(both, -1).to(q.dtype)
    out = torch.bmm(probs_HSGc[..., p:].flatten(0, 1), own_2PcD[1]).view(q_HSGD.shape)
    out += torch.bmm(probs_HSGc[..., :p].flatten(1, 2), shared_2HpD[1]).view(q_HSGD.shape)
    return out


def chunk_attention(
    q_HGqD: torch.Tensor,
    k_HcD: torch.Tensor,
    v_HcD: torch.Tensor,
    mask_qc: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence's chunk, [H, G, q, D]; the keys end with the chunk's own.

    Without a mask it is causal over itself alone. On a CPU, half precision has a fast product
    but a slow fused kernel, so there larger chunks go tile by tile.
    """
    pairs = q_HGqD.shape[2] * k_HcD.shape[1]
    slow = q_HGqD.device.type == "cpu" and q_HGqD.dtype != torch.float32
    if softcap is not None or (slow and pairs >= _TILED_PAIRS):
        return _tiled(q_HGqD, k_HcD, v_HcD, mask_qc, scaling, softcap)
    groups, queries = q_HGqD.shape[1:3]
    k, v = (x.unsqueeze(1).expand(-1, groups, -1, -1) for x in (k_HcD, v_HcD))
    if mask_qc is not None and q_HGqD.device.type == "cuda" and queries % _TORN_ROWS == 1:
        q_HGqD = torch.cat([q_HGqD, q_HGqD[:, :, -1:]], 2)
        mask_qc = torch.cat([mask_qc, mask_qc[-1:]])
    out = F.scaled_dot_product_attention(
        q_HGqD, k, v, attn_mask=mask_qc, is_causal=mask_qc is None, scale=scaling
    )
    return out[:, :, :queries]


def _tiled(
    q_HGqD: torch.Tensor,
    k_HcD: torch.Tensor,
    v_HcD: torch.Tensor,
    mask_qc: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Some queries at a time against the keys that the last of them sees."""
    k_HcD, v_HcD = k_HcD.contiguous(), v_HcD.contiguous()
    queries, keys = q_HGqD.shape[2], k_HcD.shape[1]
    out_HGqD = torch.empty_like(q_HGqD)
    for begin in range(0, queries, _TILE):
        q = q_HGqD[:, :, begin : begin + _TILE]
        end = keys - queries + begin + q.shape[2]
        k = k_HcD[:, :end]
        scores = _scores(q.flatten(1, 2), k, scaling, softcap)
        tile = scores.view(*q.shape[:3], end)
        if mask_qc is None:
            tile[..., begin:].add_(_upper(q.shape[2], scores))
        else:
            tile.add_(mask_qc[begin : begin + _TILE, :end])
        part = torch.bmm(torch.softmax(scores, -1).to(v_HcD.dtype), v_HcD[:, :end])
        out_HGqD[:, :, begin : begin + _TILE] = part.view(q.shape)
    return out_HGqD


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    softcap: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """q k^T * scaling, softly capped (float32 then), plus a mask: [P, rows, D] by [P, c, D]."""
    k = k.transpose(1, 2)
    if softcap is not None:
        scores = torch.bmm(q, k).float().mul_(scaling / softcap).tanh_().mul_(softcap)
        return scores if mask is None else scores.add_(mask)
    if mask is None:
        return torch.bmm(q, k).mul_(scaling)
    return torch.baddbmm(mask, q, k, alpha=scaling)


def _upper(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


def _rows(cache: PagedKVCache, slot_mapping_T: torch.Tensor) -> torch.Tensor:
    """[T * H] rows of [.., D] where K of layer 0 goes, head by head of each token."""
    shape = cache.shape
    size, heads = shape.block_size, shape.num_kv_heads
    block_T = slot_mapping_T // size
    first_T = block_T * (shape.num_layers * 2 * heads * size) + slot_mapping_T % size
    rows = first_T[:, None] + torch.arange(heads) * size
    return rows.flatten().to(cache.device)
