"""How the attention of one step is cut into pieces for kernels; numpy, on the host.

Legend: S sequences of the step, R those of them that decode (they come first), I work items
of decodes, X tiles of chunks, F tiles of families (decodes that begin with the same blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

_TILE = 64
"""Keys that a kernel takes at a time: pieces are multiples of it."""
_LEAST_KEYS = 128
"""Pieces of a sequence are not made smaller than this."""
_SHARED_KEYS = 256
"""Keys that a family must have in common, and"""
_SAVED_KEYS = 2048
"""keys that it must save, to be worth the joining of partial results."""
_ATTEMPTS = 4
"""Families looked for among rows that begin with the same block."""


@dataclass(frozen=True, slots=True)
class Items:
    """Decodes in pieces of about equal work, the largest first."""

    items_I4: Ints
    """(row, first key, end, part): part -1 if the piece is all of its row."""
    row_parts: Ints
    """[R + 1]: row r has the parts [row_parts[r], row_parts[r + 1]); none if it is one piece."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Decodes whose block tables begin alike."""

    tiles_F2: Ints
    """(where in the flat tables the shared blocks stand, how many keys they hold)."""
    members: Ints
    """[F * places] rows, -1 for an empty place."""
    place_of: Ints
    """[R] each row's place in `members`, -1 for a row of no family."""
    keys: Ints
    """[R] how many leading keys the family reads for a row; 0 without one."""


def decode_items(lens: Ints, skipped: Ints, aim: int) -> Items:
    """Cut rows of `lens` keys, whose first `skipped` are read elsewhere, into about `aim` pieces.

    At least one piece a row, at most `len(lens) + aim`. A row without keys is one empty piece.
    """
    own = lens - skipped
    each = max(_LEAST_KEYS, -(-int(own.sum()) // max(1, aim)))
    pieces = np.maximum(1, -(-own // each))
    size = (-(-own // pieces) + _TILE - 1) // _TILE * _TILE
    pieces = np.maximum(1, -(-own // np.maximum(size, 1)))
    parted = (pieces > 1) | (skipped > 0)
    row_parts = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(np.where(parted, pieces, 0), out=row_parts[1:])
    rows = np.repeat(np.arange(len(lens), dtype=np.int32), pieces)
    first = np.cumsum(pieces) - pieces
    at = np.arange(len(rows), dtype=np.int32) - first[rows]
    start = skipped[rows] + at * size[rows]
    end = np.minimum(start + size[rows], lens[rows])
    part = np.where(parted[rows], row_parts[rows] + at, -1)
    items = np.stack([rows, start, end, part], axis=1).astype(np.int32)
    return Items(items[np.argsort(start - end, kind="stable")], row_parts)


def find_families(
    tables_RM: Ints, lens: Ints, block_size: int, places: int, most_tiles: int
) -> Shared | None:
    """Families worth a kernel of their own; None if there are none.

    `places` members share a tile; families that save least are left out beyond `most_tiles`.
    """
    if len(lens) < 2 or int(lens.max()) < _SHARED_KEYS:
        return None
    order = np.argsort(tables_RM[:, 0], kind="stable").astype(np.int32)
    firsts = tables_RM[order, 0]
    bounds = np.flatnonzero(np.diff(firsts, prepend=-1, append=-1))
    several = np.flatnonzero(np.diff(bounds) > 1)
    found: list[tuple[int, Ints, int]] = []
    for at in several.tolist():
        alike = order[bounds[at] : bounds[at + 1]]
        for _attempt in range(_ATTEMPTS):
            if len(alike) < 2:
                break
            alike = _split_off(tables_RM, lens, block_size, alike, found)
    found.sort(key=lambda family: -family[0])
    return _tiles(found, tables_RM.shape, places, most_tiles) if found else None


def _split_off(
    tables_RM: Ints,
    lens: Ints,
    block_size: int,
    alike: Ints,
    found: list[tuple[int, Ints, int]],
) -> Ints:
    """Take the best family around the longest of these rows, if it is worth it; the other rows."""
    longest = int(lens[alike].argmax())
    same = tables_RM[alike] == tables_RM[alike[longest]]
    equal = np.where(same.all(1), same.shape[1], same.argmin(1))
    blocks = np.minimum(equal, (lens[alike] - 1) // block_size)
    order = np.argsort(-blocks, kind="stable")
    saved = np.arange(len(alike)) * blocks[order] * block_size
    best = int(saved.argmax())
    keys = int(blocks[order[best]]) * block_size
    if keys < _SHARED_KEYS or saved[best] < _SAVED_KEYS:
        return np.delete(alike, longest)
    found.append((int(saved[best]), alike[np.sort(order[: best + 1])], keys))
    return alike[np.sort(order[best + 1 :])]


def _tiles(
    families: list[tuple[int, Ints, int]], shape: tuple[int, ...], places: int, most_tiles: int
) -> Shared:
    rows, width = shape
    tiles: list[tuple[int, int]] = []
    members = np.full(most_tiles * places, -1, dtype=np.int32)
    place_of = np.full(rows, -1, dtype=np.int32)
    keys = np.zeros(rows, dtype=np.int32)
    for _saved, family, shared in families:
        need = -(-len(family) // places)
        if len(tiles) + need > most_tiles:
            continue
        begin = len(tiles) * places
        members[begin : begin + len(family)] = family
        place_of[family] = np.arange(begin, begin + len(family), dtype=np.int32)
        keys[family] = shared
        tiles += [(int(family[0]) * width, shared)] * need
    tiles_F2 = np.array(tiles, dtype=np.int32).reshape(-1, 2)
    return Shared(tiles_F2, members[: len(tiles) * places], place_of, keys)


def chunk_tiles(starts: Ints, lens: Ints, rows: Ints, tokens: int) -> Ints:
    """[X, 2] (row, first token) of these rows' chunks in tiles of `tokens`, longest work first."""
    queries = starts[rows + 1] - starts[rows]
    count = -(-queries // tokens)
    row = np.repeat(rows, count)
    at = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(count) - count, count)
    first = at * tokens
    seen = np.repeat(lens[rows] - queries, count) + first
    tiles = np.stack([row, first], axis=1).astype(np.int32)
    ordered: Ints = tiles[np.argsort(-seen, kind="stable")]
    return ordered


def unprefixed_runs(starts: Ints, lens: Ints, num_decodes: int) -> list[tuple[int, int]]:
    """Runs [first, end) of neighbouring chunks that have nothing before them in the cache."""
    plain = (starts[1:] - starts[:-1]) == lens
    plain[:num_decodes] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[0], plain.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
