"""Rows of a run: as a table, as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvxfer.bench.case import Case, size_text
from kvxfer.bench.race import share
from kvxfer.bench.ways import LIMIT_OF


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One transport, limit or rival at one size."""

    name: str
    kind: str
    """transport, limit or rival"""
    transfer_bytes: int
    block_bytes: int
    latency_us: float
    """Of a whole transfer; a transport's with its proof."""
    gb_per_s: float
    limit: str = ""
    of_limit: float | None = None
    ours: str = ""
    """Of a rival: our transport that does the same."""
    ours_is_times: float | None = None
    """How many times as fast ours is."""


def rows_of(
    case: Case, times: Mapping[str, Sequence[float]], rivals: Mapping[str, str]
) -> list[Row]:
    """`rivals`: which transport of ours each rival is like."""
    found = []
    for name, seconds in times.items():
        ours = rivals.get(name, "")
        limit = LIMIT_OF.get(ours or name, "")
        median = statistics.median(seconds)
        found.append(
            Row(
                name=name,
                kind="rival" if ours else "transport" if limit else "limit",
                transfer_bytes=case.num_bytes,
                block_bytes=case.block_bytes,
                latency_us=_short(median * 1e6),
                gb_per_s=_short(case.num_bytes / median / 1e9),
                limit=limit,
                of_limit=_share(seconds, times.get(limit)),
                ours=ours,
                ours_is_times=_share(times[ours], seconds) if ours in times else None,
            )
        )
    return found


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain data."""
    return [asdict(row) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """For people: one line a row, an empty line between sizes."""
    head = ("", "transfer", "block", "us", "GB/s", "of limit", "")
    lines: list[tuple[str, ...]] = [head]
    last = (0, 0)
    for row in rows:
        size = (row.transfer_bytes, row.block_bytes)
        if size != last:
            lines.append(("",) * len(head))
            last = size
        share_ = "" if row.of_limit is None else f"{row.of_limit:.2f} of {row.limit}"
        times = "" if row.ours_is_times is None else f"{row.ours} is {row.ours_is_times:.1f}x"
        lines.append(
            (
                row.name,
                size_text(row.transfer_bytes),
                size_text(row.block_bytes),
                f"{row.latency_us:,.0f}",
                f"{row.gb_per_s:.2f}",
                share_,
                times,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _share(seconds: Sequence[float], of: Sequence[float] | None) -> float | None:
    return round(share(seconds, of), 3) if of else None


def _short(number: float) -> float:
    """Four digits are more than such a figure has."""
    return float(f"{number:.4g}")
