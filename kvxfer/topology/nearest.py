"""How far devices of a machine are from each other, and which NICs are a GPU's nearest.

The names are those of `nvidia-smi topo -m`. Two devices below one root port reach each other
through PCIe switches alone; what comes after goes through a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from enum import IntEnum
from typing import NamedTuple

from kvxfer.topology.machine import Gpu, Machine, Nic, Place


class Link(IntEnum):
    """From near to far."""

    PIX = 0
    """One PCIe switch lies between."""
    PXB = 1
    """Several switches, below one root port."""
    PHB = 2
    """One host bridge: a CPU's root complex."""
    NODE = 3
    """Two host bridges of one CPU node."""
    SYS = 4
    """Two CPU nodes, or the machine does not say."""


class Distance(NamedTuple):
    """Smaller is nearer."""

    link: Link
    hops: int
    """Devices on the way below the port they share; 0 where they share none."""


def distance(one: Place, other: Place, *, num_nodes: int = 2) -> Distance:
    """Between two devices of a machine with so many CPU nodes."""
    common = 0
    for a, b in zip(one.bridges, other.bridges, strict=False):
        if a != b:
            break
        common += 1
    if common >= 2:
        below = len(one.bridges) - common, len(other.bridges) - common
        return Distance(Link.PIX if max(below) <= 2 else Link.PXB, sum(below))
    if common == 1:
        return Distance(Link.PHB, 0)
    near = num_nodes <= 1 or (one.node == other.node and one.node >= 0)
    return Distance(Link.NODE if near else Link.SYS, 0)


def left_out(machine: Machine) -> dict[str, str]:
    """The NICs that are of no use now, with the reason.

    A virtual function beside its own physical function adds nothing to it, and software devices
    are not taken where there are real ones.
    """
    why: dict[str, str] = {}
    for nic in machine.nics:
        if nic.node_type not in ("CA", ""):
            why[nic.name] = f"{nic.node_type}: has no plain reliable connections"
        elif not nic.active:
            states = ", ".join(f"port {port.number} is {port.state}" for port in nic.ports)
            why[nic.name] = states or "it has no port"
    left = [nic for nic in machine.nics if nic.name not in why]
    names = {nic.place.pci: nic.name for nic in left if nic.place.pci}
    real = next((nic.name for nic in left if not nic.emulated), "")
    for nic in left:
        if nic.emulated and real:
            why[nic.name] = f"software, and {real} is not"
        elif nic.physical in names:
            why[nic.name] = f"a virtual function of {names[nic.physical]}, which is here itself"
    return why


def usable(machine: Machine) -> list[Nic]:
    """The NICs that can carry data now, and none twice."""
    why = left_out(machine)
    return [nic for nic in machine.nics if nic.name not in why]


def nearest(machine: Machine, gpu: Gpu, among: Iterable[Nic] | None = None) -> list[Nic]:
    """The NICs at the smallest distance from the GPU; of several the fastest, which may be several
    again; [] without any that is usable."""
    nics = usable(machine) if among is None else list(among)
    away = {nic.name: (gpu_distance(machine, gpu, nic), -nic.rate_gbps) for nic in nics}
    least = min(away.values(), default=None)
    return [nic for nic in nics if away[nic.name] == least]


def gpu_distance(machine: Machine, gpu: Gpu, nic: Nic) -> Distance:
    """From a GPU to a NIC of its machine."""
    return distance(gpu.place, nic.place, num_nodes=len(machine.nodes))


def own_node(machine: Machine, cpus: Collection[int] | None = None) -> int:
    """The CPU node that has all CPUs that this process may run on; -1 where several have."""
    mine = set(os.sched_getaffinity(0) if cpus is None else cpus)
    return next((node for node, text in machine.nodes.items() if mine <= _cpus(text)), -1)


def _cpus(text: str) -> set[int]:
    """`0-55,112-167` as numbers."""
    found: set[int] = set()
    for piece in filter(None, text.split(",")):
        first, _, last = piece.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def by_node(machine: Machine) -> dict[int, list[Nic]]:
    """The usable NICs by CPU node, for KV in host memory; -1 holds those that belong to none."""
    found: dict[int, list[Nic]] = {}
    for nic in usable(machine):
        found.setdefault(nic.place.node, []).append(nic)
    return dict(sorted(found.items()))
