"""The suite over `rdma`, on a Soft-RoCE device. Runs in a virtual machine: nothing loads torch.

Leaks are counted on the device as the kernel sees it, for all processes of the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from kvxfer import Transport
from kvxfer.testing import TransportSuite
from kvxfer.testing.equality import EqualitySuite
from kvxfer.testing.proofs import ProofSuite
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.softroce.inside.counts import resources


class TestRdma(TransportSuite):
    def make(self) -> Transport:
        return RdmaTransport("open sesame")

    def peer_code(self) -> str:
        return (
            "from kvxfer.transports.rdma import RdmaTransport\n"
            "transport = RdmaTransport('open sesame')"
        )

    def resources(self) -> Mapping[str, int]:
        return resources()

    def test_torch_was_never_loaded(self) -> None:
        assert "torch" not in sys.modules


class TestTwoNics(EqualitySuite, ProofSuite):
    def make(self) -> Transport:
        return RdmaTransport("open sesame", settings=RdmaSettings(nics=("rxe0", "rxe1")))
