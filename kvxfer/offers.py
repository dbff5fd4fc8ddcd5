"""Which transports one end can use on this machine, and why not the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

from kvxfer import verbs
from kvxfer.topology import Machine, choose, left_out, read_machine, usable

NICS_VARIABLE: Final = "KVCACHE_RDMA_NICS"


class Offer(NamedTuple):
    """What one end can say of a transport."""

    name: str
    usable: bool
    why: str
    remedy: str = ""


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


def _cuda_ipc(device: str) -> Offer:
    if not device.startswith("cuda"):
        return Offer("cuda_ipc", False, "the KV lies in host memory")
    by = "" if find_spec("triton") else ", by copy engines alone: triton is not installed"
    return Offer("cuda_ipc", True, f"GPUs of one machine{by}")


def _shm(device: str) -> Offer:
    if device != "cpu":
        return Offer("shm", False, f"the KV lies on {device}, not in host memory")
    if not hasattr(os, "memfd_create"):
        return Offer("shm", False, "this system has no memfd_create")
    return Offer("shm", True, "processes of one user on one machine")


def _rdma(machine: Machine, env: Mapping[str, str], dev: Path) -> Offer:
    def no(why: str, remedy: str = "") -> Offer:
        return Offer("rdma", False, why, remedy)

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
