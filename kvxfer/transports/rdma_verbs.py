"""pyverbs, the Python binding of rdma-core, loaded when it is first needed.

Numbers are those of the kernel's ABI, so that they are the same whichever version is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from kvxfer import verbs
from kvxfer.errors import TransportError, UnusableTransport

QPT_RC, OPCODE_READ = 2, 4
FENCE, SIGNALED = 1, 2
LOCAL_WRITE, REMOTE_READ, RELAXED_ORDERING = 1, 4, 1 << 20
PORT_ACTIVE, LINK_INFINIBAND = 4, 1
WITH_PD, WITH_SEND_OPS, SEND_OPS_READ = 1, 1 << 6, 1 << 4


@dataclass(frozen=True, slots=True)
class Verbs:
    """The classes of pyverbs that are used here; tests put others in their places."""

    get_device_list: Any
    Context: Any
    PD: Any
    CQ: Any
    CompChannel: Any
    QP: Any
    QPEx: Any
    QPCap: Any
    QPInitAttr: Any
    QPInitAttrEx: Any
    QPAttr: Any
    AHAttr: Any
    GlobalRoute: Any
    GID: Any
    MR: Any
    DmaBufMR: Any
    SendWR: Any
    SGE: Any
    Error: type[Exception]


_HOMES = {
    "device": ("get_device_list", "Context"),
    "pd": ("PD",),
    "cq": ("CQ", "CompChannel"),
    "qp": ("QP", "QPEx", "QPCap", "QPInitAttr", "QPInitAttrEx", "QPAttr"),
    "addr": ("AHAttr", "GlobalRoute", "GID"),
    "mr": ("MR", "DmaBufMR"),
    "wr": ("SendWR", "SGE"),
}


@cache
def load() -> Verbs:
    """Raises UnusableTransport that says what to install."""
    try:
        with verbs.logging_kept():
            found = {
                name: getattr(import_module(f"pyverbs.{module}"), name)
                for module, names in _HOMES.items()
                for name in names
            }
            error = import_module("pyverbs.pyverbs_error").PyverbsError
    except Exception as cause:  # a build against other libraries fails in its own ways
        raise unusable(f"rdma needs pyverbs: {cause}", verbs.remedy()) from cause
    return Verbs(**found, Error=error)


def unusable(why: str, remedy: str) -> UnusableTransport:
    """The error for an end that cannot use RDMA; what helps is in its text, too."""
    remedy = f"{remedy} `ibv_devices` lists the devices that are found."
    return UnusableTransport(f"{why}. {remedy}", remedy=remedy)


@contextmanager
def told(binding: Verbs, what: str) -> Iterator[None]:
    """What the binding raises within becomes a TransportError with the system's errno."""
    try:
        yield
    except binding.Error as error:
        raise as_ours(error, what) from error


def as_ours(error: Exception, what: str) -> TransportError:
    """What the binding raised, with the system's errno."""
    code = getattr(error, "error_code", -1)
    known = code if isinstance(code, int) and code > 0 else None
    return TransportError(f"{what}: {error}", errno=known)
