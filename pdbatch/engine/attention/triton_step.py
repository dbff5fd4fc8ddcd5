"""Attention of one step on a GPU: Triton kernels over the pool, and FlashAttention where it fits.

    decodes                      one kernel, split by length, joined where split
    decodes with a shared start  that start once for all, joined with their own keys
    chunks                       one kernel for all, over prefix and own tokens
    chunks without a prefix      that too, where it is faster; else `varlen_attn` on the projections
                                 (`packed`); cuDNN's where many have one length (`equal`)

What a kernel masks it never reads, so old content of blocks needs no clearing.
"""

from __future__ import annotations

import torch

from pdbatch.engine.attention import packed
from pdbatch.engine.attention.tables import Tables
from pdbatch.engine.kernels import chunk, decode, merge, rotary, shared, write
from pdbatch.engine.kvcache import PagedKVCache


class TritonStep:
    """A `StepAttention` over `Tables`."""

    place = -1

    def __init__(
        self, cache: PagedKVCache, tables: Tables, wanted_rows: torch.Tensor | None = None
    ) -> None:
        self.wanted_rows = wanted_rows
        """Tokens that something comes after; None: all. For a last layer that asks."""
        self._cache = cache
        self._tables = tables

    @property
    def reads_projections(self) -> bool:
        """Whether keys must stand turned beside the queries too, not in the cache alone."""
        return bool(self._tables.runs)

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
        """As `hook.StepAttention.attend`."""
        write.write(k_HTD, v_HTD, self._cache, layer, self._tables.slots)
        q, k, v = (x.transpose(0, 1) for x in (q_HTD, k_HTD, v_HTD))
        return self._attend(layer, q, k, v, scaling, window, softcap)

    def attend_merged(
        self,
        layer: int,
        qkv_TX: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        turning: rotary.Turning,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """The same from the merged product; its queries are changed in place."""
        rotary.rotary(
            qkv_TX,
            cos_TR,
            sin_TR,
            turning,
            self._cache,
            layer,
            self._tables.slots,
            keep_k=self.reads_projections,
        )
        size, heads = self._cache.shape.head_dim, self._cache.shape.num_kv_heads
        qkv_THD = qkv_TX.view(qkv_TX.shape[0], -1, size)
        widths = [turning.num_q_heads, heads, heads]
        q, k, v = qkv_THD.split(widths, dim=1)  # type: ignore[no-untyped-call]
        return self._attend(layer, q, k, v, scaling, window, softcap)

    def _attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_THD: torch.Tensor,
        v_THD: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        tables = self._tables
        fused = packed.fused() if packed.serves(q_THD, softcap) else None
        if fused is not None and len(tables.runs) == 1:
            run = tables.runs[0]
            if (run.start, run.end) == (0, q_THD.shape[0]):
                return fused(q_THD, k_THD, v_THD, run, scaling, window)
        out_THD = q_THD.new_empty(q_THD.shape)
        if tables.num_decodes:
            self._decode(layer, q_THD, out_THD, scaling, window, softcap)
        for run in tables.runs if fused is not None else ():
            part = slice(run.start, run.end)
            assert fused is not None
            out_THD[part] = fused(q_THD[part], k_THD[part], v_THD[part], run, scaling, window)
        for tiles in (tables.tiles_X2, tables.run_tiles_X2 if fused is None else None):
            if tiles is not None:
                chunk.chunk(
                    q_THD,
                    out_THD,
                    self._cache,
                    layer,
                    tables=tables.blocks,
                    tables_at=tables.blocks_at,
                    lens=tables.lens,
                    starts=tables.starts,
                    tiles_X2=tiles,
                    rows=tables.tile_rows,
                    scaling=scaling,
                    window=window,
                    softcap=softcap,
                )
        return out_THD

    def _decode(
        self,
        layer: int,
        q_THD: torch.Tensor,
        out_THD: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        tables, heads = self._tables, self._cache.shape.num_kv_heads
        items, family = tables.own, tables.shared
        if window is not None and tables.whole is not None:
            items, family = tables.whole, None
        assert items is not None
        places = items.num_parts
        splits = 0
        if family is not None:
            splits = family.splits
            places += family.members.shape[0] * splits
        lse = torch.float32
        part_out = q_THD.new_empty(max(1, places), *q_THD.shape[1:], dtype=lse)
        part_lse = q_THD.new_empty(max(1, places), q_THD.shape[1], dtype=lse)
        if family is not None:
            shared.shared(
                q_THD,
                self._cache,
                layer,
                tables=tables.blocks,
                tiles_F2=family.tiles_F2,
                members=family.members,
                part_out=part_out,
                part_lse=part_lse,
                first_part=items.num_parts,
                splits=splits,
                scaling=scaling,
                softcap=softcap,
            )
        decode.decode(
            q_THD,
            out_THD,
            self._cache,
            layer,
            tables=tables.blocks,
            tables_at=tables.blocks_at,
            lens=tables.lens,
            items_I4=items.items_I4,
            part_out=part_out,
            part_lse=part_lse,
            scaling=scaling,
            window=window,
            softcap=softcap,
            beside=family is not None,
        )
        if places:
            merge.merge(
                out_THD,
                part_out,
                part_lse,
                row_parts=items.row_parts,
                shared_at=family.shared_at if family is not None else items.row_parts,
                rows=tables.num_decodes,
                num_kv_heads=heads,
                splits=splits,
            )
