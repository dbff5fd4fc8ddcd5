"""What the doctor found, as data: `--json` prints it as it is."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "note", "warning", "broken"]
"""note: worth knowing. warning: it works, but not as well as it could. broken: needed, and out of
order; the exit code says so."""


class Finding(msgspec.Struct, frozen=True):
    """One sentence, and one on what to do about it."""

    area: str
    level: Level
    text: str
    remedy: str = ""


class Gpu(msgspec.Struct, kw_only=True):
    """A GPU, as sysfs has it and, where CUDA answers, as CUDA does."""

    pci: str
    device: str = ""
    """`cuda:0` as this process would see it; "" where CUDA does not show it."""
    name: str = ""
    uuid: str = ""
    memory_bytes: int = 0
    capability: str = ""
    """Compute capability, `9.0`."""
    node: int = -1
    nics: list[str] = msgspec.field(default_factory=list)
    """The nearest that can be used."""
    nic_link: str = ""
    """How near: PIX, PXB, PHB, NODE or SYS."""


class GpuPair(msgspec.Struct, kw_only=True):
    """Two GPUs that CUDA shows."""

    one: str
    other: str
    peer_access: bool
    link: str
    """`NV18` (NVLinks), else the way over PCIe; "" unknown."""

    @property
    def words(self) -> str:
        """For people."""
        way = f"{self.link[2:]} NVLinks" if self.link.startswith("NV") else f"PCIe {self.link}"
        return f"peer access, {way}" if self.peer_access else f"no peer access ({way})"


class Nic(msgspec.Struct, kw_only=True):
    """An RDMA device."""

    name: str
    pci: str
    netdev: str
    link_layer: str
    ports: list[str]
    """`1: ACTIVE 400 Gb/s`"""
    node: int
    usable: bool
    why_not: str = ""


class Offer(msgspec.Struct, kw_only=True):
    """A transport, for KV that lies on `device`."""

    device: str
    name: str
    usable: bool
    why: str
    remedy: str = ""


class Pair(msgspec.Struct, kw_only=True):
    """How KV would move from one worker (or device) to another."""

    source: str
    reader: str
    transport: str
    """"" where it cannot."""
    why: str
    not_taken: dict[str, str]
    """Better ones, each with the reason."""


class Report(msgspec.Struct, kw_only=True):
    """Everything."""

    host: str
    versions: dict[str, str | None] = msgspec.field(default_factory=dict)
    gpus: list[Gpu] = msgspec.field(default_factory=list)
    gpu_pairs: list[GpuPair] = msgspec.field(default_factory=list)
    nics: list[Nic] = msgspec.field(default_factory=list)
    nic_lines: dict[str, str] = msgspec.field(default_factory=dict)
    """What `get_rdma_nics.sh` prints, by its argument."""
    cpu_nodes: dict[int, str] = msgspec.field(default_factory=dict)
    transports: list[Offer] = msgspec.field(default_factory=list)
    pairs: list[Pair] = msgspec.field(default_factory=list)
    """Of live workers; without any, of this machine's devices."""
    live_workers: int = 0
    findings: list[Finding] = msgspec.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that is needed works."""
        return not any(finding.level == "broken" for finding in self.findings)

    def add(self, area: str, level: Level, text: str, remedy: str = "") -> None:
        """Note a finding."""
        self.findings.append(Finding(area, level, text, remedy))
