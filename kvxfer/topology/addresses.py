"""An interface's IPv4 address, asked of the kernel."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24x")


def ipv4_of(interface: str) -> str:
    """The first IPv4 address of an interface; "" where it has none or does not exist."""
    request = bytearray(_IFREQ.pack(interface.encode()[:15]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, _SIOCGIFADDR, request)
        except OSError:
            return ""
    return socket.inet_ntoa(request[20:24])
