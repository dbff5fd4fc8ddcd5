"""The suite over `rdma` between two machines: the other processes are on the second one."""

from __future__ import annotations

from collections.abc import Mapping

from kvxfer import Transport
from kvxfer.testing import TransportSuite, peers
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.softroce.inside.counts import resources
from tests.softroce.inside.lab_hooks import LAB

PEER_CODE = """
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
transport = RdmaTransport("open sesame", settings=RdmaSettings(socket_ifname="rd0"))
"""


class TestRdmaAcross(TransportSuite):
    def make(self) -> Transport:
        return RdmaTransport("open sesame", settings=RdmaSettings(socket_ifname="rd0"))

    def peer_code(self) -> str:
        return PEER_CODE

    def start_peer(self, code: str) -> peers.Peer:
        return LAB.python(code)  # type: ignore[return-value]

    def resources(self) -> Mapping[str, int]:
        return resources()
