"""What the environment says about RDMA, under the names that FastDeploy knows, read once.

| variable | meaning | default |
| --- | --- | --- |
| `KVCACHE_RDMA_NICS` | devices, with or without a port: `mlx5_0,mlx5_1:2` | all that are up |
| `KVCACHE_RDMA_GID_INDEX` | which of a port's addresses | its RoCE v2 IPv4 one, else 3 |
| `KVCACHE_IB_TIMEOUT` | a packet is sent again after 4.096 µs · 2^this | 18 (1.1 s) |
| `KVCACHE_RELAX_ORDERING` | 1: blocks may be written by PCIe in any order | 0 |
| `KVCACHE_SOCKET_IFNAME` | the control connection listens on this interface | the loopback |
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from kvxfer.errors import KVUsageError

MOST_RETRIES = 6
"""7 is 'without end' on some devices (Soft-RoCE)."""
_SIOCGIFADDR = 0x8915
_SWITCH = {"": False, "0": False, "false": False, "off": False, "no": False}
_SWITCH |= {"1": True, "true": True, "on": True, "yes": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class RdmaSettings:
    """See the module. Raises KVUsageError for what no device understands."""

    nics: tuple[str, ...] | None = None
    """None: all that are up."""
    gid_index: int | None = None
    """None: found out for each port."""
    ib_timeout: int = 18
    relax_ordering: bool = False
    socket_ifname: str | None = None
    retry_count: int = MOST_RETRIES
    """How often a packet is sent again before the peer is given up."""

    def __post_init__(self) -> None:
        if not 1 <= self.ib_timeout <= 31:
            raise KVUsageError(f"KVCACHE_IB_TIMEOUT must be 1 to 31, not {self.ib_timeout}")
        if self.gid_index is not None and not 0 <= self.gid_index <= 255:
            raise KVUsageError(f"KVCACHE_RDMA_GID_INDEX must be 0 to 255, not {self.gid_index}")
        if not 0 <= self.retry_count <= MOST_RETRIES:
            raise KVUsageError(f"{self.retry_count} retries; at most {MOST_RETRIES}")
        if self.nics is not None and not self.nics:
            raise KVUsageError("KVCACHE_RDMA_NICS names no device")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> RdmaSettings:
        """As the environment says. Raises KVUsageError naming the variable."""
        nics = environ.get("KVCACHE_RDMA_NICS")
        index = environ.get("KVCACHE_RDMA_GID_INDEX")
        relaxed = environ.get("KVCACHE_RELAX_ORDERING", "").strip().lower()
        if relaxed not in _SWITCH:
            raise KVUsageError(f"KVCACHE_RELAX_ORDERING must be 0 or 1, not {relaxed!r}")
        return cls(
            nics=_names(nics) if nics else None,
            gid_index=_whole(index, "KVCACHE_RDMA_GID_INDEX") if index else None,
            ib_timeout=_whole(environ.get("KVCACHE_IB_TIMEOUT") or "18", "KVCACHE_IB_TIMEOUT"),
            relax_ordering=_SWITCH[relaxed],
            socket_ifname=environ.get("KVCACHE_SOCKET_IFNAME") or None,
        )


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises KVUsageError."""
    import fcntl

    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            found = fcntl.ioctl(sock, _SIOCGIFADDR, request)
        except OSError as error:
            raise KVUsageError(
                f"KVCACHE_SOCKET_IFNAME: {name} has no IPv4 address: {error}", errno=error.errno
            ) from error
    return socket.inet_ntoa(found[20:24])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise KVUsageError(f"{name} must be a whole number, not {text!r}") from None
