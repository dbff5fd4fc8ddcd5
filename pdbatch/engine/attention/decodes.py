"""The decodes of a step, cut into work and laid out as sections for the device.

With `room` the sections have sizes that depend on nothing but the number of rows and the kind,
as a captured graph needs; what is too many is filled so that kernels pass it over: no keys,
row -1. Without it they are as large as the step is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pdbatch.engine.attention import work
from pdbatch.engine.attention.equal import EqualPrompts
from pdbatch.engine.attention.tables import DecodeTables, SharedTables
from pdbatch.engine.kernels import shared
from pdbatch.engine.kvcache import KVShape
from pdbatch.engine.model_input import ModelInput

Kind = Literal["whole", "split", "shared"]
"""What decodes need: one kernel; parts that are joined; parts of a shared prefix as well."""
_SPARE_TILES = 4
"""Tiles beyond those of one family of all rows: families end in half-empty tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the pieces of work are cut by."""

    num_q_heads: int
    shape: KVShape
    processors: int
    """Multiprocessors of the device."""
    windowed: bool
    """Whether some layer has a sliding window."""
    equal: EqualPrompts | None = None
    """Takes prompts of one length as batches, where that is faster."""
    packed: bool = True
    """Whether other chunks without a prefix go to FlashAttention, not to the paged kernel."""

    @property
    def aim(self) -> int:
        """Work items of decodes that fill the device several times."""
        return max(16, 8 * self.processors // self.shape.num_kv_heads)

    @property
    def places(self) -> int:
        """Decodes of a family that share a tile."""
        return shared.rows_of_tile(self.num_q_heads // self.shape.num_kv_heads)[1]

    def most_tiles(self, rows: int) -> int:
        """Tiles that families among so many decodes may take."""
        return -(-rows // self.places) + _SPARE_TILES

    def splits(self, tiles: int) -> int:
        """Pieces of a shared prefix, for so many tiles."""
        return max(1, min(16, 2 * self.processors // (tiles * self.shape.num_kv_heads)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """The host's side."""

    kind: Kind
    sections: list[work.Ints]
    num_parts: int
    num_whole_parts: int
    splits: int

    def tables(
        self, sent: Iterator[torch.Tensor]
    ) -> tuple[DecodeTables, DecodeTables | None, SharedTables | None]:
        """(own, whole, shared) of `Tables`, from the sections in their order on the device."""
        own = _decode_tables(sent, self.num_parts)
        if self.kind != "shared":
            return own, None, None
        family = SharedTables(
            tiles_F2=next(sent).view(-1, 2),
            members=next(sent),
            shared_at=next(sent),
            splits=self.splits,
        )
        whole = _decode_tables(sent, self.num_whole_parts) if len(self.sections) > 5 else None
        return own, whole, family


def plan(batch: ModelInput, sizes: Sizes, room: int | None = None) -> Decodes:
    """Cut the step's decodes; with `room` for so many rows in sections of a fixed size."""
    count = batch.num_decodes
    rows = room or count
    lens = np.zeros(rows, dtype=np.int32)
    lens[:count] = batch.context_lens[:count]
    found = work.find_families(
        batch.block_tables_SM[:count].numpy(),
        lens[:count],
        sizes.shape.block_size,
        sizes.places,
        sizes.most_tiles(rows),
    )
    nothing = np.zeros(rows, dtype=np.int32)
    if found is None:
        items = work.decode_items(lens, nothing, sizes.aim)
        kind: Kind = "split" if items.row_parts[-1] else "whole"
        places = None if room is None else rows + (sizes.aim if kind == "split" else 0)
        sections, num_parts = _items(items, places)
        return Decodes(
            kind=kind, sections=sections, num_parts=num_parts, num_whole_parts=0, splits=0
        )
    places = None if room is None else rows + sizes.aim
    skipped = nothing.copy()
    skipped[:count] = found.keys
    sections, num_parts = _items(work.decode_items(lens, skipped, sizes.aim), places)
    tiles = len(found.tiles_F2) if room is None else sizes.most_tiles(rows)
    splits = sizes.splits(tiles)
    sections += _family(found, tiles, rows, num_parts, splits)
    num_whole = 0
    if sizes.windowed:
        whole, num_whole = _items(work.decode_items(lens, nothing, sizes.aim), places)
        sections += whole
    return Decodes(
        kind="shared",
        sections=sections,
        num_parts=num_parts,
        num_whole_parts=num_whole,
        splits=splits,
    )


def padded(values: work.Ints, count: int, filler: int) -> work.Ints:
    """`values`, then fillers, `count` numbers in all."""
    result = np.full(count, filler, dtype=np.int32)
    result[: len(values)] = values
    return result


def _items(items: work.Items, places: int | None) -> tuple[list[work.Ints], int]:
    """Sections of work items and the room that their partial results take."""
    flat, num_parts = items.items_I4.reshape(-1), int(items.row_parts[-1])
    if places is None:
        return [flat, items.row_parts], num_parts
    return [padded(flat, places * 4, -1), items.row_parts], places if num_parts else 0


def _family(
    found: work.Shared, tiles: int, rows: int, first_part: int, splits: int
) -> list[work.Ints]:
    places = len(found.members) // len(found.tiles_F2)
    shared_at = np.where(found.place_of < 0, -1, first_part + found.place_of * splits)
    return [
        padded(found.tiles_F2.reshape(-1), tiles * 2, 0),
        padded(found.members, tiles * places, -1),
        padded(shared_at.astype(np.int32), rows, -1),
    ]


def _decode_tables(sent: Iterator[torch.Tensor], num_parts: int) -> DecodeTables:
    items_I4 = next(sent).view(-1, 4)
    return DecodeTables(items_I4=items_I4, row_parts=next(sent), num_parts=num_parts)
