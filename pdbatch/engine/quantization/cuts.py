"""How many rows the kernel takes, and how its products are cut: as measured on an H100.

`python benchmarks/narrow_products.py --sweep` measures; benchmarks/NOTES.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64
"""With more, the weight is widened first (at 512 rows that is faster; between, not measured)."""
_FEW_ROWS = 16
_WIDE = 200
"""With so many programs of their own the multiprocessors have enough to do without shares."""
_PIECE_BYTES = 256e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a product is cut."""

    rows: int
    """Of the input, in a program: a power of two from 16."""
    outputs: int
    """In a program: a power of two."""
    shares: int
    """Programs among which a program's inputs are divided."""
    swap: bool
    """Whether outputs, not rows, are the tensor cores' first dimension."""
    warps: int = 4
    stages: int = 4


def piece(outputs: int, inputs: int) -> int:
    """Outputs whose weights are widened at a time."""
    pieces = -(-outputs * inputs * 2 // int(_PIECE_BYTES))
    return -(-outputs // pieces)


def cut(bits: int, rows: int, outputs: int, slabs: int) -> Tiles:
    """The kernel's cut of a product. What a row gives depends on its number of rows by the tile
    alone: up to 16 rows it is the same for any number."""
    few = rows <= _FEW_ROWS
    is_wide = outputs // 128 >= _WIDE
    wanted = 1 if is_wide else -(-_WIDE * 64 // outputs)
    shares = max(1, min(1 << (wanted - 1).bit_length(), slabs // 4))
    return Tiles(
        rows=next(size for size in (16, 32, 64) if rows <= size),
        outputs=128 if is_wide else 64,
        shares=shares,
        swap=not few and not (bits == 8 and is_wide),
        warps=8 if is_wide and not few else 4,
        stages=5 if few and bits == 4 and (is_wide or slabs > 32) else 3,
    )
