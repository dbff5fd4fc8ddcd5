"""The suite over `rdma` with a binding that copies within this process, and what that shows alone.

What only a device shows is tested in virtual machines: tests/softroce.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvxfer import Transport
from kvxfer.testing import TransportSuite
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.kvxfer.fake_verbs import Fabric


def made(fabric: Fabric, **settings: object) -> RdmaTransport:
    return RdmaTransport(
        "open sesame",
        settings=RdmaSettings(**settings),
        verbs=fabric.verbs(),  # type: ignore[arg-type]
    )


class TestOneNic(TransportSuite):
    fabric = Fabric()

    def make(self) -> Transport:
        return made(self.fabric)

    def resources(self) -> Mapping[str, int]:
        kinds = ("Context", "PD", "MR", "QP", "CQ", "CompChannel")
        return {kind: self.fabric.count(kind) for kind in kinds}


class TestTwoNicsWithoutTheExtendedInterface(TestOneNic):
    fabric = Fabric("fake0", "fake1", extended=False, most_message=4096)
