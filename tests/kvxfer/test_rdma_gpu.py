"""`rdma` for blocks on a GPU, as far as a machine without NICs shows it.

The rings are the real ones: page-locked memory, copied to and from the device, slot by slot. The
NICs are stand-ins that copy within this process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvxfer import Region, Transport, TransportError, cuda_region
from kvxfer.cuda.driver import driver
from kvxfer.testing.equality import EqualitySuite
from kvxfer.testing.leaks import LeakSuite
from kvxfer.testing.proofs import ProofSuite
from kvxfer.transports import rdma_staging
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_memory import export_dmabuf
from kvxfer.transports.rdma_settings import RdmaSettings
from tests.kvxfer.fake_verbs import Fabric


def _num_devices() -> int:
    try:
        return driver().num_devices
    except TransportError:
        return 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _num_devices(), reason="no CUDA device"),
]


class TestStagedBetweenPoolsOnAGpu(EqualitySuite, ProofSuite, LeakSuite):
    fabric = Fabric("fake0", "fake1")

    @pytest.fixture(autouse=True)
    def small_slots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rdma_staging, "SLOT_BYTES", 64 << 10)

    def make(self) -> Transport:
        return RdmaTransport("open sesame", settings=RdmaSettings(), verbs=self.fabric.verbs())

    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        return cuda_region(num_blocks, block_bytes, "cuda:0")

    def resources(self) -> Mapping[str, int]:
        return {kind: self.fabric.count(kind) for kind in ("MR", "QP", "CQ", "Context")}


@pytest.mark.parametrize("num_bytes", [4096, 3 << 20])
def test_a_pool_as_a_dmabuf(num_bytes: int) -> None:
    region = cuda_region(1, num_bytes, "cuda:0")
    try:
        fd, offset = export_dmabuf(region)
    except TransportError as error:
        pytest.skip(f"this driver or kernel gives no dmabuf: {error}")
    assert "dmabuf" in str(Path(f"/proc/self/fd/{fd}").readlink())
    assert offset == region.address % os.sysconf("SC_PAGE_SIZE")
    assert os.lseek(fd, 0, os.SEEK_END) >= offset + num_bytes
    os.close(fd)
    region.close()
