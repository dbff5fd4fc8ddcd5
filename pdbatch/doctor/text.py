"""The report for people: tables, then the findings, the worst last so that it is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdbatch.doctor.report import Finding, Pair, Report

_MARKS: Final = {"ok": "ok", "note": "note", "warning": "warning", "broken": "BROKEN"}
_COLORS: Final = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}
_WORST_LAST: Final = ("ok", "note", "warning", "broken")
_MOST_NAMED: Final = 4
"""Pairs of one verdict that are named; further ones are counted."""


def print_report(report: Report) -> None:
    """On stdout; plain and 110 columns wide where that is no terminal."""
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else 110, highlight=False, markup=False
    )
    for table in _tables(report):
        console.print(table)
        console.print()
    for line in filter(None, report.nic_lines.values()):
        console.print(line)
    for finding in sorted(report.findings, key=lambda f: _WORST_LAST.index(f.level)):
        console.print(_line(finding), soft_wrap=True)


def _line(finding: Finding) -> Text:
    text = Text(f"{_MARKS[finding.level]:<8}", style=_COLORS[finding.level])
    text.append(f"{finding.area}: {finding.text}", style="default")
    if finding.remedy:
        text.append(f"\n{'':8}{finding.remedy}", style="default")
    return text


def _tables(report: Report) -> Iterator[Table]:
    known = ((name, number or "-") for name, number in report.versions.items())
    yield _table(f"machine {report.host}", ("software", "version"), list(known))
    if report.gpus:
        rows = [
            (
                gpu.device or "-",
                gpu.name or "-",
                gpu.pci,
                f"{gpu.memory_bytes / 2**30:.0f} GiB" if gpu.memory_bytes else "-",
                gpu.capability or "-",
                _node(gpu.node),
                f"{','.join(gpu.nics)} ({gpu.nic_link})" if gpu.nics else "none",
                gpu.uuid or "-",
            )
            for gpu in report.gpus
        ]
        heads = ("GPU", "name", "PCI", "memory", "capability", "node", "nearest NICs", "UUID")
        yield _table("GPUs", heads, rows)
    if report.gpu_pairs:
        yield _matrix(report)
    if report.nics:
        cells = [
            (
                nic.name,
                nic.pci or "-",
                nic.netdev or "-",
                nic.link_layer or "-",
                "; ".join(nic.ports),
                _node(nic.node),
                "yes" if nic.usable else nic.why_not,
            )
            for nic in report.nics
        ]
        titles = ("NIC", "PCI", "interface", "link", "ports", "node", "usable")
        yield _table("NICs", titles, cells)
    offers = [(o.device, o.name, "yes" if o.usable else "no", o.why) for o in report.transports]
    yield _table("transports", ("KV on", "transport", "usable", "why"), offers)
    if report.pairs:
        title = "pairs of workers" if report.live_workers else "pairs of this machine's devices"
        yield _table(title, ("from → to", "transport", "why", "not taken"), _pair_rows(report))


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _matrix(report: Report) -> Table:
    """Each GPU against each: its link, with a mark where peers have no access."""
    names = [gpu.device for gpu in report.gpus if gpu.device]
    links = {}
    for pair in report.gpu_pairs:
        cell = (pair.link or "?") + ("" if pair.peer_access else " no peer access")
        links[pair.one, pair.other] = links[pair.other, pair.one] = cell
    rows = [(a, *("X" if a == b else links.get((a, b), "-") for b in names)) for a in names]
    return _table("links between GPUs", ("", *names), rows)


def _pair_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """One row for each verdict: many pairs of a machine are alike."""

    def verdict(pair: Pair) -> tuple[str, str, str]:
        not_taken = "; ".join(f"{name}: {why}" for name, why in pair.not_taken.items())
        return pair.transport or "NONE", pair.why, not_taken

    rows = []
    for alike, group in groupby(sorted(report.pairs, key=verdict), verdict):
        names = [f"{pair.source} → {pair.reader}" for pair in group]
        more = len(names) - _MOST_NAMED
        shown = names[:_MOST_NAMED] + ([f"and {more} more"] if more > 0 else [])
        rows.append(("\n".join(shown), *alike))
    return rows


def _node(node: int) -> str:
    return str(node) if node >= 0 else "-"
