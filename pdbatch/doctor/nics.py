"""RDMA devices and the transports: what is here, what is nearest, what is in the way."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

from kvxfer import choice, offers, verbs
from kvxfer.errors import UnknownTransport, UnusableTransport
from kvxfer.topology import Machine, left_out, rdma_nics_line, usable
from kvxfer.topology.rdma_nics import KINDS
from pdbatch.config import Settings
from pdbatch.doctor.report import Nic, Offer, Report

CAP_IPC_LOCK: Final = 14
ENOUGH_LOCKED_BYTES: Final = 1 << 30


def look(report: Report, settings: Settings, machine: Machine) -> None:
    """Fills in NICs, their lines, and which transports there are for KV on each kind of device."""
    why_not = left_out(machine)
    report.nics = [
        Nic(
            name=nic.name,
            pci=nic.place.pci,
            netdev=nic.netdev,
            link_layer=nic.link_layers or ("software" if nic.emulated else ""),
            ports=[f"{p.number}: {p.state} {p.rate_gbps:g} Gb/s" for p in nic.ports],
            node=nic.place.node,
            usable=nic.name not in why_not,
            why_not=why_not.get(nic.name, ""),
        )
        for nic in machine.nics
    ]
    report.nic_lines = {kind: rdma_nics_line(machine, kind) for kind in KINDS}
    report.cpu_nodes = dict(machine.nodes)
    for device in _devices(report):
        report.transports += [
            Offer(device=device, name=o.name, usable=o.usable, why=o.why, remedy=o.remedy)
            for o in offers.available(device, machine=machine)
        ]
    _judge_choice(report, settings)
    _judge_rdma(report, machine)


def opened(report: Report, settings: Settings, device: str) -> tuple[str, ...]:
    """The transports that an engine on `device` would open with these settings; () where it
    would refuse to start."""
    mine = [
        offers.Offer(o.name, o.usable, o.why, o.remedy)
        for o in report.transports
        if o.device == kind_of(device)
    ]
    try:
        return tuple(choice.select(settings.kv_transport, mine)[0])
    except (UnknownTransport, UnusableTransport):
        return ()


def kind_of(device: str) -> str:
    """`cuda` for every GPU: transports differ by kind of memory alone."""
    return device.partition(":")[0]


def engine_device(report: Report, settings: Settings) -> str:
    """Where an engine of these settings would run here."""
    if settings.device != "auto":
        return settings.device.partition(",")[0]
    return next((gpu.device for gpu in report.gpus if gpu.device), "cpu")


def _devices(report: Report) -> list[str]:
    return ["cpu", "cuda"] if any(gpu.device for gpu in report.gpus) else ["cpu"]


def _judge_choice(report: Report, settings: Settings) -> None:
    """A transport that was named must be usable; under auto it may be missing."""
    device = engine_device(report, settings)
    known = {o.name: o for o in report.transports if o.device == kind_of(device)}
    if settings.kv_transport == ("auto",):
        names = ", ".join(opened(report, settings, device))
        report.add("transport", "ok", f"auto, for KV on {device}: {names}")
        return
    for name in settings.kv_transport:
        offer = known.get(name)
        if offer is not None and not offer.usable:
            text = f"kv_transport names {name}, of no use for KV on {device}: {offer.why}"
            remedy = offer.remedy or f"Leave {name} out, or set kv_transport to `auto`."
            report.add("transport", "broken", text, remedy)
    if opened(report, settings, device):
        report.add("transport", "ok", f"for KV on {device}: {', '.join(settings.kv_transport)}")


def _judge_rdma(report: Report, machine: Machine) -> None:
    trouble = verbs.pyverbs_trouble()
    active = usable(machine)
    if not active:
        have = "no RDMA device" if not machine.nics else "no RDMA device that can be used"
        also = "; pyverbs is not here either" if trouble else ""
        remedy = trouble.remedy if trouble and machine.nics else ""
        report.add("rdma", "note", have + also, remedy)
        return
    offer = next(o for o in report.transports if o.name == "rdma")
    if trouble:
        report.add("rdma", "warning", trouble.why, trouble.remedy)
    elif not offer.usable:
        report.add("rdma", "warning", offer.why, offer.remedy)
    else:
        report.add("rdma", "ok", offer.why)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= soft < ENOUGH_LOCKED_BYTES and not _may_lock():
        report.add(
            "rdma",
            "warning",
            f"only {soft / 2**20:.3g} MiB may be locked (RLIMIT_MEMLOCK): KV cannot be registered",
            "Raise it: `ulimit -l unlimited`, LimitMEMLOCK=infinity, `--ulimit memlock=-1`.",
        )


def _may_lock() -> bool:
    """Whether this process has CAP_IPC_LOCK, to which the limit does not apply."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return False
    words = next((line.split() for line in status.splitlines() if line.startswith("CapEff")), [])
    return len(words) == 2 and bool(int(words[1], 16) >> CAP_IPC_LOCK & 1)
