"""Bandwidth by size as an SVG, a panel for each size of block. No library: a chart of lines needs a
hundred lines, and the figure stays text that a repository can diff."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from kvxfer.bench.case import size_text
from kvxfer.bench.report import Row

_PANEL_WIDTH, _PANEL_HEIGHT = 380, 260
_LEFT, _TOP, _RIGHT, _BOTTOM = 56, 64, 44, 44
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Told apart by people who see few colours too (Okabe and Ito)."""


def svg(rows: Sequence[Row]) -> str:
    """The whole file. Limits are dashed, rivals dotted."""
    blocks = sorted({row.block_bytes for row in rows})
    names = list(dict.fromkeys(row.name for row in rows))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    width = _LEFT + len(blocks) * (_PANEL_WIDTH + _RIGHT)
    height = _TOP + _PANEL_HEIGHT + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _legend(rows, names, colours),
    ]
    top = _ceiling(max(row.gb_per_s for row in rows))
    for index, block in enumerate(blocks):
        shown = [row for row in rows if row.block_bytes == block]
        left = _LEFT + index * (_PANEL_WIDTH + _RIGHT)
        parts.append(_panel(shown, left, top, f"blocks of {size_text(block)}", colours))
    parts.append(
        f'<text x="16" y="{_TOP + _PANEL_HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {_TOP + _PANEL_HEIGHT / 2})">GB/s</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _panel(
    rows: Sequence[Row], left: float, top: float, title: str, colours: dict[str, str]
) -> str:
    sizes = sorted({row.transfer_bytes for row in rows})
    low, high = math.log2(sizes[0]), math.log2(sizes[-1])
    inner = _PANEL_WIDTH - 24

    def x(size: int) -> float:
        part = (math.log2(size) - low) / (high - low) if high > low else 0.5
        return round(left + 12 + part * inner, 1)

    def y(speed: float) -> float:
        return round(_TOP + _PANEL_HEIGHT * (1 - speed / top), 1)

    parts = [
        f'<rect x="{left}" y="{_TOP}" width="{_PANEL_WIDTH}" height="{_PANEL_HEIGHT}" '
        'fill="none" stroke="#999"/>',
        f'<text x="{left + _PANEL_WIDTH / 2}" y="{_TOP - 8}" text-anchor="middle">{title}</text>',
    ]
    for step in range(5):
        speed = top * step / 4
        parts.append(
            f'<line x1="{left}" x2="{left + _PANEL_WIDTH}" y1="{y(speed)}" y2="{y(speed)}" '
            f'stroke="#ddd"/><text x="{left - 4}" y="{y(speed) + 4}" '
            f'text-anchor="end" font-size="10">{speed:g}</text>'
        )
    for size in sizes:
        parts.append(
            f'<text x="{x(size)}" y="{_TOP + _PANEL_HEIGHT + 16}" text-anchor="middle" '
            f'font-size="10">{size_text(size)}</text>'
        )
    for name, colour in colours.items():
        mine = sorted((r for r in rows if r.name == name), key=lambda r: r.transfer_bytes)
        if mine:
            points = " ".join(f"{x(r.transfer_bytes)},{y(r.gb_per_s)}" for r in mine)
            parts.append(f'<polyline points="{points}" {_stroke(mine[0].kind, colour)}/>')
            parts += [
                f'<circle cx="{x(r.transfer_bytes)}" cy="{y(r.gb_per_s)}" r="3" fill="{colour}">'
                f"<title>{escape(name)}: {r.gb_per_s:.2f} GB/s, {r.latency_us:,.0f} us</title>"
                "</circle>"
                for r in mine
            ]
    return "\n".join(parts)


def _legend(rows: Sequence[Row], names: Sequence[str], colours: dict[str, str]) -> str:
    kinds = {row.name: row.kind for row in rows}
    parts, at = [], float(_LEFT)
    for name in names:
        stroke = _stroke(kinds[name], colours[name])
        parts.append(
            f'<line x1="{at}" x2="{at + 24}" y1="20" y2="20" {stroke}/>'
            f'<text x="{at + 30}" y="24">{escape(name)}</text>'
        )
        at += 48 + 7 * len(name)
    return "\n".join(parts)


def _stroke(kind: str, colour: str) -> str:
    dashes = {"limit": ' stroke-dasharray="6 4"', "rival": ' stroke-dasharray="2 3"'}
    return f'fill="none" stroke="{colour}" stroke-width="2"{dashes.get(kind, "")}'


def _ceiling(speed: float) -> float:
    """A round number above it that four lines divide well."""
    scale: float = 10.0 ** math.floor(math.log10(speed))
    return next(scale * step for step in (1, 2, 4, 6, 8, 10) if scale * step >= speed)
