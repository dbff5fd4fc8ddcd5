"""What there is in a machine that KV can move through: GPUs, RDMA devices, interfaces, CPU nodes.

Read from sysfs alone: no driver is called, so nothing can hang, and a tree recorded elsewhere
(`read_machine(root)`) tells the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvxfer.topology.addresses import ipv4_of
from kvxfer.topology.sysfs import Sysfs

PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
GPU_CLASSES = ("0x0300", "0x0302")
NVIDIA = "0x10de"
NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device hangs."""

    pci: str
    """Its PCI address, `0000:1b:00.0`; "" for one that is no PCI device."""
    bridges: tuple[str, ...]
    """From the host bridge (`pci0000:15`) over the root port and switches down to `pci`."""
    node: int
    """The CPU node it is attached to; -1: the machine does not say."""

    @property
    def root_port(self) -> str:
        """The port of the root complex it hangs on; its own address without one."""
        return self.bridges[1] if len(self.bridges) > 1 else ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU, by its PCI address: CUDA's numbers are the processes' own matter."""

    place: Place
    device: str
    """PCI device id."""


@dataclass(frozen=True, slots=True)
class Gid:
    """One of a port's addresses."""

    index: int
    gid: str
    kind: str
    """`IB/RoCE v1`, `RoCE v2`; "" where the driver does not say."""
    netdev: str


@dataclass(frozen=True, slots=True)
class Port:
    """One port of an RDMA device."""

    number: int
    state: str
    """`ACTIVE`, `DOWN`, `INIT`, …"""
    link_layer: str
    """`InfiniBand` or `Ethernet`."""
    rate_gbps: float
    gids: tuple[Gid, ...]

    @property
    def active(self) -> bool:
        """Whether it carries data now."""
        return self.state == "ACTIVE"


@dataclass(frozen=True, slots=True)
class Nic:
    """An RDMA device, as verbs name it."""

    name: str
    place: Place
    ports: tuple[Port, ...]
    netdev: str
    """Its interface; that of the bond where it is bonded; "" where it has none."""
    emulated: bool
    """rxe or siw: software over an ordinary interface."""
    physical: str
    """The PCI address of the function that it is a virtual function of; "" for others."""
    node_type: str = "CA"
    """`CA`; `RNIC` for iWARP."""

    @property
    def active(self) -> bool:
        """Whether any port carries data now."""
        return any(port.active for port in self.ports)

    @property
    def rate_gbps(self) -> float:
        """Of all active ports together."""
        return sum(port.rate_gbps for port in self.ports if port.active)

    @property
    def link_layers(self) -> str:
        """`InfiniBand`, `Ethernet` or both."""
        return "+".join(sorted({port.link_layer for port in self.ports if port.link_layer}))


@dataclass(frozen=True, slots=True)
class Netdev:
    """A network interface."""

    name: str
    place: Place
    up: bool
    ipv4: str
    """Its first address; "" without one."""
    bond_members: tuple[str, ...]
    """Not empty for a bond."""
    virtual: bool
    """No device: a bond, a bridge, one end of a pair, …"""


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything, sorted by name or address."""

    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]
    netdevs: tuple[Netdev, ...]
    nodes: Mapping[int, str]
    """CPUs (`0-55,112-167`) by node."""

    def gpu(self, pci: str) -> Gpu | None:
        """The GPU at this PCI address, in any spelling (`00000000:1B:00.0`)."""
        wanted = _short(pci)
        return next((gpu for gpu in self.gpus if _short(gpu.place.pci) == wanted), None)

    def nic(self, name: str) -> Nic | None:
        """The RDMA device of this name."""
        return next((nic for nic in self.nics if nic.name == name), None)


def read_machine(root: str | Path = "/sys", *, ipv4: Callable[[str], str] | None = None) -> Machine:
    """The machine whose sysfs is at `root`. `ipv4` gives an interface's address, which sysfs does
    not have; it defaults to asking the kernel where `root` is the kernel's own."""
    sysfs = Sysfs(root)
    ask = ipv4 or (ipv4_of if Path(root) == Path("/sys") else lambda name: "")
    names = sysfs.names("class", "infiniband")
    return Machine(
        gpus=tuple(_gpus(sysfs)),
        nics=tuple(_nic(sysfs, name) for name in names if sysfs.names("class", "infiniband", name)),
        netdevs=tuple(_netdev(sysfs, name, ask) for name in sysfs.names("class", "net")),
        nodes=_nodes(sysfs),
    )


def _gpus(sysfs: Sysfs) -> list[Gpu]:
    found = []
    for address in sorted(sysfs.names("bus", "pci", "devices")):
        at = ("bus", "pci", "devices", address)
        of_class = sysfs.text(*at, "class").startswith(GPU_CLASSES)
        if of_class and sysfs.text(*at, "vendor") == NVIDIA:
            found.append(Gpu(_place(sysfs, *at), sysfs.text(*at, "device")))
    return found


def _nic(sysfs: Sysfs, name: str) -> Nic:
    at = ("class", "infiniband", name)
    place = _place(sysfs, *at)
    numbers = [int(n) for n in sysfs.names(*at, "ports") if n.isdigit()]
    ports = tuple(_port(sysfs, name, number) for number in numbers)
    function = sysfs.place(*at, "device", "physfn")
    return Nic(
        name,
        place,
        ports,
        netdev=_netdev_of(sysfs, name, ports),
        emulated=not place.pci or sysfs.has(*at, "parent"),
        physical=function[-1] if function else "",
        node_type=sysfs.text(*at, "node_type").partition(":")[2].strip(),
    )


def _port(sysfs: Sysfs, name: str, number: int) -> Port:
    at = ("class", "infiniband", name, "ports", str(number))
    rate = re.match(r"[\d.]+", sysfs.text(*at, "rate"))
    gids = []
    for index in sysfs.names(*at, "gids"):
        gid = sysfs.text(*at, "gids", index)
        if gid and gid != NO_GID:
            kind = sysfs.text(*at, "gid_attrs", "types", index)
            netdev = sysfs.text(*at, "gid_attrs", "ndevs", index)
            gids.append(Gid(int(index), gid, kind, netdev))
    return Port(
        number,
        state=sysfs.text(*at, "state").partition(":")[2].strip() or "unknown",
        link_layer=sysfs.text(*at, "link_layer"),
        rate_gbps=float(rate[0]) if rate else 0.0,
        gids=tuple(gids),
    )


def _netdev_of(sysfs: Sysfs, name: str, ports: tuple[Port, ...]) -> str:
    """The interface that the GIDs name; without such, that of the same port of the same device."""
    for port in ports:
        for gid in port.gids:
            if gid.netdev:
                return gid.netdev
    at = ("class", "infiniband", name)
    if parent := sysfs.text(*at, "parent"):
        return parent
    beside = sysfs.names(*at, "device", "net")
    for netdev in beside:
        number = sysfs.number(*at, "device", "net", netdev, "dev_port")
        if any(number == port.number - 1 for port in ports):
            return netdev
    return beside[0] if beside else ""


def _netdev(sysfs: Sysfs, name: str, ipv4: Callable[[str], str]) -> Netdev:
    at = ("class", "net", name)
    return Netdev(
        name,
        _place(sysfs, *at),
        up=sysfs.text(*at, "operstate") == "up",
        ipv4=ipv4(name),
        bond_members=tuple(sysfs.text(*at, "bonding", "slaves").split()),
        virtual=sysfs.place(*at)[:2] == ("devices", "virtual"),
    )


def _nodes(sysfs: Sysfs) -> dict[int, str]:
    at = ("devices", "system", "node")
    found = [name for name in sysfs.names(*at) if re.fullmatch(r"node\d+", name)]
    return {int(name[4:]): sysfs.text(*at, name, "cpulist") for name in found}


def _place(sysfs: Sysfs, *at: str) -> Place:
    """By the path of the device's folder; the device itself is the last PCI address in it."""
    parts = sysfs.place(*at)
    first = next((n for n, part in enumerate(parts) if HOST_BRIDGE.fullmatch(part)), len(parts))
    bridges = list(parts[first : first + 1])
    for part in parts[first + 1 :]:
        if not PCI_ADDRESS.fullmatch(part):
            break
        bridges.append(part)
    if len(bridges) < 2:
        return Place("", (), -1)
    node = sysfs.number(*parts[: first + len(bridges)], "numa_node")
    return Place(bridges[-1], tuple(bridges), node)


def _short(pci: str) -> tuple[int, str]:
    """Domain as a number (it is written with four or eight digits), then the rest."""
    domain, _, rest = pci.lower().partition(":")
    return int(domain, 16), rest
