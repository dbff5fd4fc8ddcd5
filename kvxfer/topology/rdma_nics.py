"""Which NICs to use: the answers that FastDeploy's `get_rdma_nics.sh` gives, from sysfs.

    gpu      KVCACHE_RDMA_NICS=…       active NICs below a root port that has a GPU below it, too
    cpu      KV_CACHE_SOCKET_IFNAME=…  the interface for everything else: a bond, else the first
                                       that is up, has an address, and shares no such port
    cpu_ib   KVCACHE_RDMA_NICS=…       bonded NICs whose bond has an address; without such the
                                       active NICs that share no root port with a GPU

What is the same: rule, format and order (eth0, eth1, …, ib0, …, xgbe0, …). What is wider: names of
interfaces and PCI domains are anybody's; bonded devices count by their bond; an InfiniBand port
needs no IP over InfiniBand; where no NIC shares a root port with any GPU (virtual machines without
switches), the nearest by CPU node are taken instead of none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from kvxfer.topology.machine import Gpu, Machine, Netdev, Nic, Place
from kvxfer.topology.nearest import by_node, nearest, usable
from kvxfer.topology.sysfs import natural

KINDS: Final = ("gpu", "cpu", "cpu_ib")
_ORDER: Final = ("eth", "ib", "xgbe")


def rdma_nics_line(machine: Machine, kind: str) -> str:
    """The line without its end; "" where there is nothing to name. `kind` is one of KINDS."""
    if kind == "cpu":
        netdev = socket_netdev(machine)
        return f"KV_CACHE_SOCKET_IFNAME={netdev.name}" if netdev else ""
    nics = gpu_nics(machine) if kind == "gpu" else _bonded(machine) or cpu_nics(machine)
    return "KVCACHE_RDMA_NICS=" + ",".join(nic.name for nic in nics) if nics else ""


def gpu_nics(machine: Machine) -> list[Nic]:
    """The NICs for KV on GPUs."""
    ports = _gpu_ports(machine)
    found = [nic for nic in usable(machine) if _port(nic.place) in ports]
    if not found:
        near = {nic.name for gpu in machine.gpus for nic in nearest(machine, gpu)}
        found = [nic for nic in usable(machine) if nic.name in near]
    return sorted(found, key=_rank)


def cpu_nics(machine: Machine) -> list[Nic]:
    """The NICs that are no GPU's."""
    ports = _gpu_ports(machine)
    return sorted((n for n in usable(machine) if _port(n.place) not in ports), key=_rank)


def socket_netdev(machine: Machine) -> Netdev | None:
    """The interface for what is not KV: a bond first, then others that are no GPU's."""
    ports = _gpu_ports(machine)
    ready = [netdev for netdev in machine.netdevs if netdev.up and netdev.ipv4]
    bonds = [netdev for netdev in ready if netdev.bond_members]
    others = [n for n in ready if not n.virtual and _port(n.place) not in ports]
    others.sort(key=lambda netdev: _name_rank(netdev.name))
    return next(iter(bonds + others), None)


def nics_for(machine: Machine, gpu: Gpu | None = None, node: int = -1) -> list[Nic]:
    """The NICs for KV on one GPU, or in the host memory of one CPU node (-1: any).

    [] only where none is usable.
    """
    if gpu is not None:
        return sorted(nearest(machine, gpu), key=_rank)
    nodes = by_node(machine)
    return sorted(nodes.get(node) or usable(machine), key=_rank)


def choose(machine: Machine, names: Sequence[str]) -> list[Nic]:
    """The NICs of a list that somebody gave. Raises ValueError that says which is of no use."""
    found = []
    for name in names:
        nic = machine.nic(name)
        if nic is None or not nic.active:
            there = [each.name for each in machine.nics]
            problem = "has no active port" if nic else f"is not there (there are {there})"
            raise ValueError(f"the NIC {name} {problem}")
        found.append(nic)
    return found


def _bonded(machine: Machine) -> list[Nic]:
    addressed = {n.name for n in machine.netdevs if n.bond_members and n.up and n.ipv4}
    return sorted((nic for nic in usable(machine) if nic.netdev in addressed), key=_rank)


def _gpu_ports(machine: Machine) -> set[tuple[str, ...]]:
    return {_port(gpu.place) for gpu in machine.gpus} - {()}


def _port(place: Place) -> tuple[str, ...]:
    """Host bridge and root port; () for a device that hangs on no port."""
    return place.bridges[:2] if len(place.bridges) > 2 else ()


def _rank(nic: Nic) -> tuple[int, object]:
    return _name_rank(nic.netdev) if _kind(nic.netdev) < len(_ORDER) else (9, natural(nic.name))


def _name_rank(name: str) -> tuple[int, object]:
    return _kind(name), natural(name)


def _kind(netdev: str) -> int:
    match = re.fullmatch(r"([a-z]+)\d+", netdev)
    return _ORDER.index(match[1]) if match and match[1] in _ORDER else len(_ORDER)
