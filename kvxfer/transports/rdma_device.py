"""An RDMA device and one port of it: what it can do, and memory that it may touch.

A device is opened when a transport is made and closed with it; everything that was made on it is
closed before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvxfer.errors import KVUsageError, TransportError
from kvxfer.transports import rdma_verbs as abi
from kvxfer.transports.rdma_settings import RdmaSettings
from kvxfer.transports.rdma_verbs import Verbs, told, unusable

_FALLBACK_GID_INDEX = 3
_NO_DEVICE = (
    "A NIC needs its kernel module and its provider (Debian: ibverbs-providers, rdma-core); a "
    "container needs `--device /dev/infiniband`."
)
_MAPPED_IPV4 = "0000:0000:0000:0000:0000:ffff:"


@dataclass(frozen=True, slots=True, repr=False)
class Spot:
    """Where memory lies for a device, and the key to it. Neither is for logs or descriptors."""

    address: int
    key: int


class Device:
    """Raises TransportError where the device or its port cannot be used."""

    def __init__(self, verbs: Verbs, nic: str, settings: RdmaSettings) -> None:
        self.verbs, self.nic = verbs, nic
        self.name, _, port = nic.partition(":")
        self.port = int(port or 1)
        with told(verbs, f"{nic} cannot be opened"):
            self.context = verbs.Context(name=self.name)
        try:
            self._look(settings)
            with told(verbs, f"{nic}: no protection domain"):
                self.domain = verbs.PD(self.context)
        except BaseException:
            self.context.close()
            raise
        self._relaxed = abi.RELAXED_ORDERING if settings.relax_ordering else 0

    def _look(self, settings: RdmaSettings) -> None:
        with told(self.verbs, f"{self.nic} does not answer"):
            port = self.context.query_port(self.port)
            limits = self.context.query_device()
        if port.state != abi.PORT_ACTIVE:
            raise TransportError(f"{self.nic}: the port is not up")
        self.lid, self.mtu = int(port.lid), int(port.active_mtu)
        self.most_message_bytes = int(port.max_msg_sz)
        self.most_requests = int(limits.max_qp_wr)
        self.most_completions = int(limits.max_cqe)
        self.reads_out = _depth(limits.max_qp_init_rd_atom)
        self.reads_in = _depth(limits.max_qp_rd_atom)
        self.gid_index = settings.gid_index
        if self.gid_index is None:
            infiniband = port.link_layer == abi.LINK_INFINIBAND
            self.gid_index = 0 if infiniband else ipv4_gid_index(self.name, self.port)
        with told(self.verbs, f"{self.nic} has no GID {self.gid_index}"):
            self.gid = str(self.context.query_gid(self.port, self.gid_index))

    def register(self, address: int, num_bytes: int, access: int, *, relaxed: bool = False) -> Any:
        """A memory region over host memory; the caller closes it. Raises TransportError."""
        what = f"{self.nic}: {num_bytes >> 20} MiB cannot be registered (see 'ulimit -l')"
        access |= self._relaxed if relaxed else 0
        with told(self.verbs, what):
            return self.verbs.MR(self.domain, num_bytes, access, address=address)

    def register_dmabuf(self, fd: int, offset: int, num_bytes: int, access: int) -> Any:
        """The same over memory of an accelerator. The device counts addresses from the start of
        the descriptor's memory: block 0 is at `offset`."""
        what = f"{self.nic}: {num_bytes >> 20} MiB of a GPU cannot be registered"
        with told(self.verbs, what):
            access |= self._relaxed
            return self.verbs.DmaBufMR(self.domain, num_bytes, access, dmabuf=fd, offset=offset)

    def close(self) -> None:
        """What was made on it was closed before. Idempotent."""
        close_each([self.context, self.domain])


def open_devices(verbs: Verbs, settings: RdmaSettings) -> list[Device]:
    """Those that the settings name, else every one whose first port is up.

    Raises KVUsageError where there is none, or where one that was named cannot be used.
    """
    try:
        names = [_text(device.name) for device in verbs.get_device_list()]
    except verbs.Error:  # what it says where the kernel has no RDMA at all
        names = []
    if not names:
        raise unusable("rdma needs an RDMA device and there is none", _NO_DEVICE)
    unknown = [nic for nic in settings.nics or () if nic.partition(":")[0] not in names]
    if unknown:
        raise KVUsageError(f"KVCACHE_RDMA_NICS: no {', '.join(unknown)} among {', '.join(names)}")
    found: list[Device] = []
    why: list[str] = []
    for nic in settings.nics or names:
        try:
            found.append(Device(verbs, nic, settings))
        except (TransportError, ValueError) as error:
            why.append(str(error))
    if not found or (settings.nics and why):
        close_each(found)
        raise unusable(f"rdma: {'; '.join(why)}", "Check cables and `rdma link`.")
    return found


def close_each(made: list[Any]) -> None:
    """Close all, last first, and empty the list; what one of them raises keeps none open."""
    failed: Exception | None = None
    while made:
        try:
            made.pop().close()
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed


def ipv4_gid_index(device: str, port: int, root: str = "/sys/class/infiniband") -> int:
    """The port's first RoCE v2 address that is an IPv4 one; else 3, which is that on most."""
    folder = Path(root) / device / "ports" / str(port)
    try:
        indices = sorted(int(path.name) for path in (folder / "gids").iterdir())
    except (OSError, ValueError):
        return _FALLBACK_GID_INDEX
    for index in indices:
        try:
            gid = (folder / "gids" / str(index)).read_text(encoding="ascii").strip()
            if not gid.startswith(_MAPPED_IPV4):
                continue
            kind = (folder / "gid_attrs" / "types" / str(index)).read_text(encoding="ascii")
        except OSError:
            continue
        if kind.strip() == "RoCE v2":
            return index
    return _FALLBACK_GID_INDEX


def _depth(reads: int) -> int:
    """How many reads of one queue pair may be under way: the field has 8 bits."""
    return max(1, min(int(reads), 255))


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
