"""`python -m kvxfer.topology gpu|cpu|cpu_ib`: the line to export, as in `rdma_nics`."""

from __future__ import annotations

import sys

from kvxfer.topology import left_out, rdma_nics_line, read_machine
from kvxfer.topology.rdma_nics import KINDS


def main(arguments: list[str]) -> int:
    """Prints the line; 1 and the reason on stderr where there is nothing to name."""
    if len(arguments) != 1 or arguments[0] not in KINDS:
        print(f"usage: python -m kvxfer.topology {'|'.join(KINDS)}", file=sys.stderr)
        return 2
    machine = read_machine()
    if line := rdma_nics_line(machine, arguments[0]):
        print(line)
        return 0
    why = "; ".join(f"{name}: {reason}" for name, reason in left_out(machine).items())
    if not why:
        why = "no GPU" if arguments[0] == "gpu" and machine.nics else "no RDMA device"
    print(f"nothing to name ({why})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
