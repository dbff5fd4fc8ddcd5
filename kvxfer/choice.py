"""Which transports an end can use, which one two ends would take, and why not the others.

`auto` is all that can be used here, in the order of AUTO: on one device or between peers of one
machine (cuda_ipc), through shared memory, by RDMA, by TCP. A list is kept as given; a name in it
that cannot be used is an error, since somebody asked for it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvxfer import verbs
from kvxfer.errors import KVUsageError, UnknownTransport, UnusableTransport
from kvxfer.topology import (
    Machine,
    choose,
    left_out,
    nics_for,
    own_node,
    read_machine,
    usable,
)
from kvxfer.transports import MemTransport, ShmTransport, TcpTransport
from kvxfer.transports.base import Transport

logger = logging.getLogger(__name__)

AUTO: Final = ("cuda_ipc", "shm", "rdma", "tcp")
"""From fast to slow; what `auto` tries."""
NAMES: Final = (*AUTO, "mem")
LOOPBACK: Final = ("127.", "localhost", "::1")
NICS_VARIABLE: Final = "KVCACHE_RDMA_NICS"


class Offer(NamedTuple):
    """What one end can say of a transport."""

    name: str
    usable: bool
    why: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What decides, of one end."""

    host: str
    device: str
    """Where its engine computes: `cpu`, `cuda:0`."""
    transports: tuple[str, ...]
    """Those that it opened, best first."""
    gpu: str = ""
    """Which GPU that is (its UUID), where known: numbers are each process's own."""
    listen_host: str = ""
    """Where it listens; "" unknown."""


class Verdict(NamedTuple):
    """How KV would move; `transport` is "" where it cannot."""

    transport: str
    why: str
    passed_over: tuple[tuple[str, str], ...]
    """The better ones that were not taken, each with the reason."""


def available(
    device: str = "cpu",
    *,
    machine: Machine | None = None,
    env: Mapping[str, str] = os.environ,
    dev: str | Path = "/dev/infiniband",
) -> list[Offer]:
    """All of AUTO, for an end whose blocks lie on `device`: usable or not, and why.

    Tells of this machine unless `machine` is another; imports pyverbs where a NIC is active.
    """
    return [
        _cuda_ipc(device),
        _shm(device),
        _rdma(machine or read_machine(), env, Path(dev)),
        Offer("tcp", True, "any two machines that reach each other"),
    ]


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, `auto` alone or not at all. Raises UnknownTransport."""
    for name in names:
        if name in NAMES or (name == "auto" and len(names) == 1):
            continue
        if name == "auto":
            raise UnknownTransport("`auto` stands alone, not in a list", remedy="Name them all.")
        near = difflib.get_close_matches(name, NAMES, n=1)
        remedy = f"Did you mean {near[0]}? " if near else ""
        raise UnknownTransport(
            f"there is no transport {name!r}", remedy=f"{remedy}There are {', '.join(AUTO)}."
        )
    if not names:
        raise UnknownTransport("no transport is named", remedy=f"Name some of {', '.join(AUTO)}.")
    return tuple(dict.fromkeys(names))


def select(names: Sequence[str], offers: Sequence[Offer]) -> tuple[list[str], list[Offer]]:
    """The transports to open, best first, and the offers that `auto` left out.

    Raises UnknownTransport, and UnusableTransport for one that was named and cannot be used.
    """
    wanted = check_names(names)
    by_name = {offer.name: offer for offer in offers}
    if wanted == ("auto",):
        taken = [offer.name for offer in offers if offer.usable]
        return taken, [offer for offer in offers if not offer.usable]
    for name in wanted:
        offer = by_name.get(name)
        if offer is not None and not offer.usable:
            raise UnusableTransport(
                f"{name} cannot be used here: {offer.why}",
                remedy=offer.remedy or f"Leave {name} out of the list, or say `auto`.",
            )
    return list(wanted), []


def open_transport(
    name: str, *, host: str, secret: str, listen_host: str, device: str = "cpu"
) -> Transport:
    """One transport by its name, for blocks that lie on `device`; what it needs is loaded now.

    Raises UnknownTransport, and what the transport itself raises.
    """
    makers: dict[str, Any] = {
        "mem": MemTransport,
        "shm": lambda: ShmTransport(host),
        "tcp": lambda: TcpTransport(secret, listen_host=listen_host),
        "rdma": lambda: _open_rdma(secret, listen_host, device),
        "cuda_ipc": lambda: _load("cuda_ipc", "CudaIpcTransport")(secret, host=host),
    }
    check_names([name])
    made: Transport = makers[name]()
    return made


def meet(
    source: End, reader: End, *, gpu_link: str = "", closed: Mapping[str, str] | None = None
) -> Verdict:
    """What `reader` would take to pull from `source`: its first transport that reaches.

    For the reasons: `gpu_link` says how their GPUs reach each other, `closed` why the reader has
    not opened a transport.
    """
    passed: list[tuple[str, str]] = []
    same_host = source.host == reader.host
    for name in sorted(set(AUTO) - set(reader.transports), key=AUTO.index):
        unknown = f"{reader.host}'s {reader.device} has not opened it"
        passed.append((name, (closed or {}).get(name, unknown)))
    for name in reader.transports:
        problem = _problem(name, source, reader)
        if problem:
            passed.append((name, problem))
            continue
        why = _reason(name, source, reader, gpu_link) if same_host else "two machines"
        better = [entry for entry in passed if _before(entry[0], name, reader.transports)]
        return Verdict(name, why, tuple(better))
    return Verdict("", "no transport reaches from one to the other", tuple(passed))


def _problem(name: str, source: End, reader: End) -> str:
    """Why this transport does not reach; "" where it does."""
    if name not in source.transports:
        return f"{source.host}'s {source.device} does not offer it"
    if name in ("cuda_ipc", "shm", "mem") and source.host != reader.host:
        return "works within one machine"
    if source.host != reader.host and source.listen_host.startswith(LOOPBACK):
        return f"{source.host} listens on {source.listen_host}, which no other machine reaches"
    return ""


def _reason(name: str, source: End, reader: End, gpu_link: str) -> str:
    if name != "cuda_ipc":
        return "one machine"
    one = (source.gpu or source.device) == (reader.gpu or reader.device)
    return "one device" if one else gpu_link or "two devices of one machine"


def _before(name: str, taken: str, order: Sequence[str]) -> bool:
    """Whether `name` would have been better than the one that was taken."""
    ranks = list(order) if name in order else list(AUTO)
    return taken not in ranks or ranks.index(name) < ranks.index(taken)


def _cuda_ipc(device: str) -> Offer:
    if not device.startswith("cuda"):
        return Offer("cuda_ipc", False, "the KV lies in host memory")
    if not _is_built("cuda_ipc"):
        return Offer("cuda_ipc", False, "this kvxfer has it not")
    if find_spec("triton") is None:
        return Offer("cuda_ipc", False, "triton is not installed", "Run `pip install triton`.")
    return Offer("cuda_ipc", True, "GPUs of one machine")


def _shm(device: str) -> Offer:
    if device != "cpu":
        return Offer("shm", False, f"the KV lies on {device}, not in host memory")
    if not hasattr(os, "memfd_create"):
        return Offer("shm", False, "this system has no memfd_create")
    return Offer("shm", True, "processes of one user on one machine")


def _rdma(machine: Machine, env: Mapping[str, str], dev: Path) -> Offer:
    def no(why: str, remedy: str = "") -> Offer:
        return Offer("rdma", False, why, remedy)

    if not _is_built("rdma"):
        return no("this kvxfer has it not")
    if not machine.nics:
        return no("this machine has no RDMA device")
    listed = env.get(NICS_VARIABLE, "").split(",")
    named = [name.partition(":")[0].strip() for name in listed if name.strip()]
    try:
        nics = choose(machine, named) if named else usable(machine)
    except ValueError as error:
        return no(f"{NICS_VARIABLE}: {error}", f"Correct or unset {NICS_VARIABLE}.")
    if not nics:
        left = "; ".join(f"{name}: {why}" for name, why in left_out(machine).items())
        return no(f"no RDMA device has an active port ({left})", "Check cables and `rdma link`.")
    if not any(os.access(path, os.R_OK | os.W_OK) for path in dev.glob("uverbs*")):
        return no(
            f"{dev}/uverbs* cannot be opened",
            "Give the container its devices (`--device /dev/infiniband`), or the user its rights.",
        )
    if trouble := verbs.pyverbs_trouble():
        return no(trouble.why, trouble.remedy)
    rates = ", ".join(f"{nic.name} {nic.rate_gbps:g} Gb/s" for nic in nics)
    return Offer("rdma", True, f"active: {rates}")


def near_nics(device: str, machine: Machine | None = None) -> list[str]:
    """The NICs for blocks on `device`: a GPU's nearest, else those of the CPU node this process
    is bound to (of all nodes, where it is bound to none); of these the fastest. [] without any."""
    here = machine or read_machine()
    gpu = here.gpu(_pci_of(device)) if device.startswith("cuda") else None
    nics = nics_for(here, gpu, own_node(here))
    most = max((nic.rate_gbps for nic in nics), default=0.0)
    return [nic.name for nic in nics if nic.rate_gbps == most]


def _open_rdma(secret: str, listen_host: str, device: str) -> Transport:
    """With the nearest NICs, unless the environment names some; with all that open, where one of
    the nearest does not."""
    module = importlib.import_module("kvxfer.transports.rdma_settings")
    make = _load("rdma", "RdmaTransport")
    settings = module.RdmaSettings.from_env()
    names = near_nics(device) if settings.nics is None else []
    if names:
        with contextlib.suppress(KVUsageError):
            near = replace(settings, nics=tuple(names))
            made: Transport = make(secret, listen_host=listen_host, settings=near)
            logger.info("RDMA for KV on %s by %s", device, ", ".join(names))
            return made
    any_nic: Transport = make(secret, listen_host=listen_host, settings=settings)
    return any_nic


def _pci_of(device: str) -> str:
    """The PCI address of a GPU that this process knows as `cuda:N`."""
    torch = importlib.import_module("torch")
    seen = torch.cuda.get_device_properties(device)
    return f"{seen.pci_domain_id:04x}:{seen.pci_bus_id:02x}:{seen.pci_device_id:02x}.0"


def _is_built(module: str) -> bool:
    return find_spec(f"kvxfer.transports.{module}") is not None


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"kvxfer.transports.{module}"), name)
