"""Transports by their names, each with what it needs, which is loaded then."""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import replace
from typing import Any

from kvxfer.choice import check_names
from kvxfer.errors import KVUsageError
from kvxfer.topology import Machine, nics_for, own_node, read_machine
from kvxfer.transports import MemTransport, ShmTransport, TcpTransport
from kvxfer.transports.base import Transport

logger = logging.getLogger(__name__)


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


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"kvxfer.transports.{module}"), name)
