"""One launch that copies scattered pieces: from a peer's memory over NVLink, or within a device.

The grid is bounded: each program walks over its share of the tiles, so that a long read occupies a
few multiprocessors for a while and leaves the others to whatever else runs. A program has the next
tile's bytes on their way before it writes those of this one.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvxfer.cuda.driver import driver
from kvxfer.kernels.table import GROUP_WORDS, HEAD_WORDS, Shape

_HEAD = tl.constexpr(HEAD_WORDS)
_GROUP = tl.constexpr(GROUP_WORDS)


@triton.jit
def _rows(
    table,
    group,
    rows,
    tile,
    UNIT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Of a tile's rows: where they begin at both ends, and how many units each still has."""
    rows_of_span = tl.load(group + 1).to(tl.int32)
    rows_of_pair = rows_of_span * tl.load(group + 2).to(tl.int32)
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < rows
    rest = row % rows_of_pair
    pair = table + (tl.load(group + 5) + 2 * (row // rows_of_pair))
    span = table + (tl.load(group + 3) + 2 * (rest // rows_of_span))
    within = (rest % rows_of_span).to(tl.int64) * ROW_BYTES
    src = tl.load(table) + tl.load(pair, mask=live, other=0) * tl.load(table + 2)
    dst = tl.load(table + 1) + tl.load(pair + 1, mask=live, other=0) * tl.load(table + 3)
    src += tl.load(span, mask=live, other=0) + within
    dst += tl.load(span + 1, mask=live, other=0) + within
    units = ROW_BYTES // UNIT
    if not EVEN:
        units = tl.minimum((tl.load(group) - within) // UNIT, units)
    return src, dst, tl.where(live, units, 0).to(tl.int32)


@triton.jit
def _pointers(address, UNIT: tl.constexpr, COLUMNS: tl.constexpr, ELEMENT: tl.constexpr):
    rows = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), UNIT)
    return rows[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def gather_kernel(
    table,
    UNIT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    ELEMENT: tl.constexpr,
    EACH: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """See `kvxfer.kernels.table`. ELEMENT has EACH bytes; UNIT is what addresses are multiples of.

    AHEAD: load the next tile before this one is written.
    """
    COLUMNS: tl.constexpr = ROW_BYTES // EACH
    first = tl.program_id(0)
    step = tl.num_programs(0)
    unit = (tl.arange(0, COLUMNS) // (UNIT // EACH))[None, :]
    for index in range(tl.load(table + 4).to(tl.int32)):
        group = table + (_HEAD + _GROUP * index)
        rows = (tl.load(group + 1) * tl.load(group + 2) * tl.load(group + 4)).to(tl.int32)
        tiles = tl.cdiv(rows, ROWS)
        if AHEAD:
            src, dst, units = _rows(table, group, rows, first, UNIT, ROW_BYTES, ROWS, EVEN)
            mask = unit < units[:, None]
            now = tl.load(_pointers(src, UNIT, COLUMNS, ELEMENT), mask=mask)
            for tile in range(first, tiles, step):
                src, to, units = _rows(table, group, rows, tile + step, UNIT, ROW_BYTES, ROWS, EVEN)
                wanted = unit < units[:, None]
                then = tl.load(_pointers(src, UNIT, COLUMNS, ELEMENT), mask=wanted)
                tl.store(_pointers(dst, UNIT, COLUMNS, ELEMENT), now, mask=mask)
                now, dst, mask = then, to, wanted
        else:
            for tile in range(first, tiles, step):
                src, dst, units = _rows(table, group, rows, tile, UNIT, ROW_BYTES, ROWS, EVEN)
                mask = unit < units[:, None]
                now = tl.load(_pointers(src, UNIT, COLUMNS, ELEMENT), mask=mask)
                tl.store(_pointers(dst, UNIT, COLUMNS, ELEMENT), now, mask=mask)


_ELEMENTS = {16: (tl.int64, 8), 4: (tl.int32, 4), 1: (tl.int8, 1)}


def launch(
    table: Any, shape: Shape, programs: int, *, num_warps: int = 8, ahead: bool = True
) -> Any:
    """On PyTorch's current device and stream. `table`: a tensor of 64-bit words on the device, or
    on the host where the device reads it there. Returns what Triton compiled."""
    element, each = _ELEMENTS[shape.unit]
    return gather_kernel[(programs,)](
        table,
        shape.unit,
        shape.row_bytes,
        shape.rows,
        shape.even,
        element,
        each,
        ahead,
        num_warps=num_warps,
    )


_compiled: dict[tuple[int, Shape], tuple[int, int, int]] = {}
"""By device and shape: the kernel as the driver knows it, its threads, its shared bytes."""


def launch_on(device: int, stream: int, table: Any, shape: Shape, programs: int) -> None:
    """On that stream; the device's context is current.

    Triton compiles and launches the first one of a shape; the driver alone launches the others,
    which takes a fraction of the time.
    """
    found = _compiled.get((device, shape))
    if found is not None:
        function, threads, shared_bytes = found
        driver().launch(function, programs, threads, shared_bytes, table.data_ptr(), stream)
        return
    import torch

    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device)):  # type: ignore[no-untyped-call]
        kernel = launch(table, shape, programs)
    handle = getattr(kernel, "function", None)
    if isinstance(handle, int) and handle:
        threads = 32 * kernel.metadata.num_warps
        _compiled[device, shape] = handle, threads, kernel.metadata.shared
