"""How many rows the kernel takes, and how its products are cut: as measured on an H100.

`python benchmarks/narrow_products.py --sweep` measures; benchmarks/NOTES.md has the figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdbatch.engine.kernels.narrow import Tiles

MOST_ROWS = 64
"""With more, widening the weight first is faster."""
_FEW_ROWS = 16
_WIDE = 200
"""With so many programs of their own the multiprocessors have enough to do without shares."""

_PIECE_BYTES = 256e6


def piece(outputs: int, inputs: int) -> int:
    """Outputs whose weights are widened at a time."""
    pieces = -(-outputs * inputs * 2 // int(_PIECE_BYTES))
    return -(-outputs // pieces)


def cut(bits: int, rows: int, outputs: int, slabs: int) -> Tiles:
    """The kernel's cut of a product. What a row gives depends on its number of rows by the tile
    alone: up to 16 rows it is the same for any number."""
    from pdbatch.engine.kernels.narrow import Tiles

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
