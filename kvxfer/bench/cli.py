"""`python -m kvxfer bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvxfer.bench import rivals
from kvxfer.bench.case import Case, size_of
from kvxfer.bench.plot import svg
from kvxfer.bench.race import Turn, race
from kvxfer.bench.report import Row, as_json, rows_of, table
from kvxfer.bench.ways import NAMES, entrants, look, wanted
from kvxfer.errors import KVUsageError

_SIZES = ["64KiB", "1MiB", "16MiB", "64MiB"]
_BLOCKS = ["64KiB", "512KiB", "2MiB"]
_USAGE = """\
blocks of 16 tokens in 16 bits: SmolLM2-135M 360KiB, Llama-3.2-1B 512KiB, Llama-3-8B 2MiB.
A size is left out where it is smaller than its blocks."""


def main(argv: Sequence[str]) -> None:
    """Print a table, or JSON."""
    args = _parser().parse_args(argv)
    try:
        rows = list(_rows(args))
    except KVUsageError as error:
        sys.exit(f"kvxfer bench: {error}")
    if args.plot is not None:
        args.plot.write_text(svg(rows), encoding="utf-8")
    print(json.dumps(as_json(rows), indent=1) if args.json else table(rows))


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    machine = look()
    names = wanted(machine, args.transport)
    if not args.json and not args.transport:
        for name, why in machine.why_not.items():
            print(f"without {name}: {why}")
    cases = [
        Case(size, block, args.rounds)
        for block in args.blocks
        for size in args.sizes
        if block <= size
    ]
    if not cases:
        raise KVUsageError("no size is as large as its blocks")
    pool_bytes = max(case.pool_bytes for case in cases)
    with rivals.starting(args.peer, _pythons(args), pool_bytes) as others:
        for case in cases:
            with entrants(case, machine, names) as found:
                field: dict[str, Turn] = dict(found)
                for rival in others:
                    rival.load(case)
                    field[rival.name] = rival.turn
                times = race(field, args.rounds, len(case.tables))
            yield from rows_of(case, times, {r.name: rivals.OURS[r.name] for r in others})


def _pythons(args: argparse.Namespace) -> dict[str, str]:
    """Which Python each rival runs in. Raises KVUsageError."""
    found = dict.fromkeys(args.peer, sys.executable)
    for entry in args.peer_python:
        name, _, path = entry.rpartition("=")
        if name and name not in rivals.OURS:
            raise KVUsageError(f"--peer-python {entry}: there is no peer {name!r}")
        for peer in args.peer:
            if name in ("", peer, peer.partition("-")[0]):
                found[peer] = path
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvxfer bench",
        description="Latency and bandwidth of every transport of this machine, beside its limits.",
        epilog=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--transport", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--sizes", nargs="+", type=_size, default=[*map(size_of, _SIZES)], metavar="SIZE",
        help=f"of transfers; {' '.join(_SIZES)}")  # fmt: skip
    add("--blocks", nargs="+", type=_size, default=[*map(size_of, _BLOCKS)], metavar="SIZE",
        help=f"of blocks; {' '.join(_BLOCKS)}")  # fmt: skip
    add("--rounds", type=int, default=31, help="each size is moved so often; 31")
    add("--peer", nargs="+", default=[], choices=[*rivals.OURS], metavar="LIBRARY",
        help=f"measure these beside ours: {', '.join(rivals.OURS)}")  # fmt: skip
    add("--peer-python", nargs="+", default=[], metavar="[LIBRARY=]PYTHON",
        help="the Python in which they are installed; this one")  # fmt: skip
    add("--json", action="store_true")
    add("--plot", type=Path, metavar="FILE", help="bandwidth by size, as an SVG")
    return parser


def _size(text: str) -> int:
    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
