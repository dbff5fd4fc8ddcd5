"""The ways for KV to move, behind one contract (`kvxfer.transports.base`)."""

from __future__ import annotations

from kvxfer.transports.mem import Fault, MemTransport
from kvxfer.transports.shm import ShmTransport
from kvxfer.transports.tcp import TcpTransport

__all__ = ["Fault", "MemTransport", "ShmTransport", "TcpTransport"]
