"""Sysfs trees of machines as text: built into a folder, or recorded from the machine at hand.

    # a comment; the first ones say whether the tree was recorded or modelled, and on what
    ipv4: eth0=10.0.0.5 bond1=10.1.0.5
    devices/pci0000:15/0000:15:01.0/0000:16:00.0 | class=0x020700; numa_node=0
      infiniband/mlx5_0 | node_type=1: CA
        ports/1 | state=4: ACTIVE; gids/0=fe80:…

A line is a folder and the files in it; one that is indented lies below. The links that the kernel
makes (bus/pci/devices, class/net, class/infiniband, each device's `device`) are made by the same
rule. `physfn -> DEVICE` is written as `physfn=@0000:3b:00.0`.

`python tests/kvxfer/sysfs_trees.py` prints the tree of this machine in this form, without
addresses.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from kvxfer.topology import Machine, read_machine

HERE = Path(__file__).parent / "sysfs"
PCI = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
IB_FILES = ("node_type", "parent")
PORT_FILES = ("state", "phys_state", "rate", "link_layer")
NET_FILES = ("operstate", "type", "dev_port", "bonding/slaves")


class Tree(NamedTuple):
    """A tree that was built."""

    root: Path
    ipv4: dict[str, str]

    def machine(self) -> Machine:
        """What kvxfer reads of it."""
        return read_machine(self.root, ipv4=lambda name: self.ipv4.get(name, ""))


def build(name: str, root: Path) -> Tree:
    """The tree `sysfs/<name>.txt` below `root`."""
    return build_text((HERE / f"{name}.txt").read_text(encoding="ascii"), root)


def build_text(text: str, root: Path) -> Tree:
    """The tree that `text` tells."""
    above: list[tuple[int, Path]] = []
    ipv4: dict[str, str] = {}
    places: dict[str, Path] = {}
    later: list[tuple[Path, str]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("ipv4:"):
            ipv4 |= dict(pair.split("=") for pair in line.split()[1:])
            continue
        indent = len(line) - len(line.lstrip())
        above = [entry for entry in above if entry[0] < indent]
        path, _, files = line.strip().partition(" | ")
        folder = (above[-1][1] if above else root) / path
        folder.mkdir(parents=True, exist_ok=True)
        above.append((indent, folder))
        for pair in filter(None, (each.strip() for each in files.split(";"))):
            file, _, content = pair.partition("=")
            if content.startswith("@"):
                later.append((folder / file, content[1:]))
                continue
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(content + "\n", encoding="ascii")
        _link(root, folder, places)
    for link, pci in later:
        link.symlink_to(os.path.relpath(places[pci], link.parent))
    return Tree(root, ipv4)


def _link(root: Path, folder: Path, places: dict[str, Path]) -> None:
    """What the kernel links to this folder and to those above it."""
    for at in (folder, *folder.parents):
        if at == root:
            return
        if PCI.fullmatch(at.name):
            places[at.name] = at
            _symlink(root / "bus/pci/devices" / at.name, at)
        if at.parent.name in ("net", "infiniband") and "devices" in at.parts:
            _symlink(root / "class" / at.parent.name / at.name, at)
            if at.parent.parent.name != "virtual":
                _symlink(at / "device", at.parent.parent)


def _symlink(link: Path, to: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(to, link.parent))


def record(root: Path) -> str:
    """The text of the tree at `root`: what `kvxfer.topology` reads, and no more."""
    lines = []
    for device in sorted((root / "bus/pci/devices").glob("*")):
        kind = _read(device / "class")
        if kind.startswith(("0x02", "0x03")):
            lines.append(_line(root, device, ("class", "vendor", "device", "numa_node")))
            if (device / "physfn").exists():
                lines[-1] += f"; physfn=@{(device / 'physfn').resolve().name}"
    for nic in sorted((root / "class/infiniband").glob("*")):
        lines.append(_line(root, nic, IB_FILES))
        for port in sorted((nic / "ports").glob("*")):
            gids = [f"gid_attrs/{kind}/0" for kind in ("types", "ndevs")]
            lines.append(_line(root, port, (*PORT_FILES, "gids/0", *gids)))
    for netdev in sorted((root / "class/net").glob("*")):
        if netdev.is_dir():
            lines.append(_line(root, netdev, NET_FILES))
    for node in sorted((root / "devices/system/node").glob("node*")):
        lines.append(_line(root, node, ("cpulist",)))
    return "\n".join(lines) + "\n"


def _line(root: Path, folder: Path, names: tuple[str, ...]) -> str:
    texts = {name: _read(folder / name) for name in names}
    files = "; ".join(f"{name}={text}" for name, text in texts.items() if text)
    return f"{folder.resolve().relative_to(root)} | {files}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.stdout.write(record(Path("/sys")))
