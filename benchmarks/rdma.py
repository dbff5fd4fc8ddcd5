"""RDMA without hardware: reads over Soft-RoCE beside `ib_read_bw`, in one boot of one machine.

    python -m benchmarks.rdma [--blocks 16KiB 64KiB 1MiB] [--mooncake PYTHON] [--json]

Boots a machine of tests/softroce and runs `python -m kvxfer bench --transport rdma` in it:
transfers of 16 MiB, in requests of the size of a block, between two processes; perftest's figure is
taken with requests of the same size right before. PYTHON is one in which Mooncake's transfer engine
is installed (`mooncake-transfer-engine-non-cuda`); its reads go over the same device.

The processor is emulated, so only what stands in one line can be compared. Prints a table, or
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tests.softroce.kernel import LabUnavailable
from tests.softroce.lab import Lab

_BLOCKS = ["16KiB", "64KiB", "256KiB", "1MiB"]
_ENVIRON = {
    "KVCACHE_RDMA_NICS": "rxe0",
    "MOONCAKE_PROTOCOL": "rdma",
    "MOONCAKE_DEVICE": "rxe0",
    "MC_GID_INDEX": "1",
}
Row = Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    """See the module."""
    args = _parser().parse_args(argv)
    words = ["-m", "kvxfer", "bench", "--transport", "rdma", "--sizes", args.size, "--json"]
    words += ["--rounds", str(args.rounds), "--blocks", *args.blocks]
    if args.mooncake:
        words += ["--peer", "mooncake", "--peer-python", args.mooncake]
    try:
        lab = Lab.prepare()
    except LabUnavailable as error:
        sys.exit(str(error))
    with lab.machine(num_cpus=args.cpus, memory_mb=2048) as machine:
        process = machine.start([sys.executable, *words], environ=_ENVIRON, apart=True)
        if process.wait(args.seconds):
            sys.exit(process.output + process.errors)
    rows = json.loads(process.output[process.output.index("[\n") :])
    print(json.dumps(rows) if args.json else "\n".join(lines(rows)))
    return 0


def lines(rows: Sequence[Row]) -> list[str]:
    """One for each size of block."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["block_bytes"], {})[row["name"]] = row["gb_per_s"] * 1e3
    text = ["request KiB   ib_read_bw MB/s   kvxfer MB/s   of it   Mooncake MB/s   times"]
    for size, speeds in sorted(found.items()):
        limit, ours = speeds["ib_read_bw"], speeds["rdma"]
        line = f"{size >> 10:11}   {limit:15.1f}   {ours:11.1f}   {ours / limit:5.2f}"
        if other := speeds.get("mooncake"):
            line += f"   {other:13.1f}   {ours / other:5.2f}"
        text.append(line)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rdma")
    add = parser.add_argument
    add("--blocks", nargs="+", default=_BLOCKS, metavar="SIZE", help=" ".join(_BLOCKS))
    add("--size", default="16MiB", help="of a transfer; 16MiB")
    add("--rounds", type=int, default=9, help="transfers that are timed; 9")
    add("--cpus", type=int, default=2, help="of the machine; 2")
    add("--seconds", type=float, default=1800, help="that it may take; 1800")
    add("--mooncake", metavar="PYTHON", help="measure Mooncake's transfer engine too")
    add("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
