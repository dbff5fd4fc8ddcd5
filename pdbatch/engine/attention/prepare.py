"""From a step's `ModelInput` to `Tables` on the device, in one copy.

Two ways: as large as the step is (`eager`), or at fixed places for a captured graph (`Captured`),
whose kernels read the same addresses each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pdbatch.engine.attention import decodes, work
from pdbatch.engine.attention.tables import Run, Tables
from pdbatch.engine.attention.upload import Upload, aligned, views
from pdbatch.engine.kernels import chunk
from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.pending import put_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """A step on the device."""

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    tables: Tables


def eager(batch: ModelInput, sizes: decodes.Sizes, upload: Upload) -> Step:
    """A step of any form."""
    count, rows = batch.num_decodes, len(batch.context_lens)
    starts = np.asarray(batch.cu_seqlens_q, dtype=np.int32)
    lens = np.asarray(batch.context_lens, dtype=np.int32)
    plan = decodes.plan(batch, sizes) if count else None
    runs = work.unprefixed_runs(starts, lens, count)
    pieces = list(_pieces(runs, lens, sizes))
    tile_rows, *tiles = _tiles(starts, lens, count, pieces, sizes)
    sections = [*_tokens(batch), starts, lens, _blocks_at(batch, rows), _blocks(batch)]
    sections += plan.sections if plan is not None else []
    sections += [part.reshape(-1) for part in tiles]
    sections += [starts[a : b + 1] - starts[a] for a, b, _equal in pieces]
    sent = iter(upload.send(sections))
    ids, positions, slots, starts_d, lens_d, blocks_at, blocks = (next(sent) for _ in range(7))
    put_tokens(ids, batch.tokens_before)
    own, whole, shared = plan.tables(sent) if plan is not None else (None, None, None)
    paged, others = (next(sent).view(-1, 2) for _ in range(2))
    tables = Tables(
        num_decodes=count,
        slots=slots,
        starts=starts_d,
        lens=lens_d,
        blocks=blocks,
        blocks_at=blocks_at,
        own=own,
        whole=whole,
        shared=shared,
        tiles_X2=paged if paged.numel() else None,
        runs=[
            Run(
                int(starts[a]),
                int(starts[b]),
                next(sent),
                int(lens[a:b].max()),
                sizes.equal if equal else None,
            )
            for a, b, equal in pieces
        ],
        run_tiles_X2=others if others.numel() else None,
        tile_rows=tile_rows,
    )
    return Step(ids, positions, tables)


def _pieces(
    runs: list[tuple[int, int]], lens: work.Ints, sizes: decodes.Sizes
) -> Iterator[tuple[int, int, bool]]:
    """(first, end, whether all have one length and go as a batch) of each piece of the runs that
    is not the paged kernel's."""
    for first, end in runs:
        cut = [(end - first, False)]
        if sizes.equal is not None:
            cut = sizes.equal.cut(lens[first:end].tolist())
        for count, batch in cut:
            if batch or sizes.packed:
                yield first, first + count, batch
            first += count


class Captured:
    """Fixed places on the device for decodes of up to `rows` sequences of `most_blocks` blocks."""

    def __init__(self, sizes: decodes.Sizes, upload: Upload, rows: int, most_blocks: int) -> None:
        self._sizes = sizes
        self._upload = upload
        items = aligned(4 * (rows + sizes.aim)) + aligned(rows + 1)
        tiles = aligned(2 * sizes.most_tiles(rows))
        members = aligned(sizes.most_tiles(rows) * sizes.places)
        fixed = 6 * aligned(rows) + 2 * items + tiles + members
        device = upload.device
        self._buffer = torch.zeros(
            fixed + aligned(rows * most_blocks), dtype=torch.int32, device=device
        )

    def fill(self, batch: ModelInput, plan: decodes.Decodes, rows: int) -> None:
        """Send a step of at most `rows` decodes; `plan` was made with room for `rows`."""
        self._upload.send_into([*_head(batch, rows), *plan.sections, _blocks(batch)], self._buffer)
        put_tokens(self._buffer[:rows], batch.tokens_before)  # the ids, which come first

    def step(self, batch: ModelInput, plan: decodes.Decodes, rows: int) -> Step:
        """The places where `fill` puts any step of this kind and so many rows."""
        sizes = [rows] * 5 + [len(section) for section in plan.sections]
        sent = iter([*views(self._buffer, sizes), self._buffer[sum(map(aligned, sizes)) :]])
        ids, positions, slots, lens, blocks_at = (next(sent) for _ in range(5))
        own, whole, shared = plan.tables(sent)
        tables = Tables(
            num_decodes=rows,
            slots=slots,
            starts=lens,
            lens=lens,
            blocks=next(sent),
            blocks_at=blocks_at,
            own=own,
            whole=whole,
            shared=shared,
        )
        return Step(ids, positions, tables)


def _head(batch: ModelInput, rows: int) -> list[work.Ints]:
    ids, positions, slots = _tokens(batch)
    lens = np.asarray(batch.context_lens, dtype=np.int32)
    return [
        decodes.padded(ids, rows, 0),
        decodes.padded(positions, rows, 0),
        decodes.padded(slots, rows, -1),
        decodes.padded(lens, rows, 0),
        _blocks_at(batch, rows),
    ]


def _tiles(
    starts: work.Ints,
    lens: work.Ints,
    count: int,
    pieces: list[tuple[int, int, bool]],
    sizes: decodes.Sizes,
) -> tuple[int, work.Ints, work.Ints]:
    """(rows of a tile, tiles of the paged kernel's chunks, tiles of the pieces')."""
    plain = np.zeros(len(lens), dtype=bool)
    for a, b, _equal in pieces:
        plain[a:b] = True
    group = sizes.num_q_heads // sizes.shape.num_kv_heads
    chunks = np.arange(count, len(lens), dtype=np.int32)
    queries = float(starts[-1] - count) / max(1, len(chunks))
    rows, tokens = chunk.rows_of_tile(group, sizes.shape, queries)
    paged, others = chunks[~plain[count:]], chunks[plain[count:]]
    return (
        rows,
        work.chunk_tiles(starts, lens, paged, tokens),
        work.chunk_tiles(starts, lens, others, tokens),
    )


def _tokens(batch: ModelInput) -> list[work.Ints]:
    parts = (batch.input_ids_T, batch.positions_T, batch.slot_mapping_T)
    return [part.numpy().astype(np.int32) for part in parts]


def _blocks(batch: ModelInput) -> work.Ints:
    flat: work.Ints = batch.block_tables_SM.numpy().reshape(-1)
    return flat


def _blocks_at(batch: ModelInput, rows: int) -> work.Ints:
    """Where each sequence's blocks begin; for padding at 0, where something always is."""
    count, width = batch.block_tables_SM.shape
    return decodes.padded(np.arange(count, dtype=np.int32) * width, rows, 0)
