"""cuda_ipc on real devices: the suite on one GPU and, where there are two, between them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvxfer import (
    DeviceRegion,
    Move,
    ReadPlan,
    Region,
    Span,
    TcpTransport,
    Transport,
    TransportError,
    whole_blocks,
)
from kvxfer.cuda import cuda_region
from kvxfer.cuda.driver import driver
from kvxfer.cuda.lanes import Lanes
from kvxfer.cuda.mover import By, has_kernel, start
from kvxfer.testing import TransportSuite
from kvxfer.testing.checks import settles
from kvxfer.testing.equality import EqualitySuite
from kvxfer.testing.harness import LARGE, TransportHarness
from kvxfer.testing.proofs import ProofSuite
from kvxfer.transports.cuda_ipc import CudaIpcTransport


def _num_devices() -> int:
    try:
        return driver().num_devices
    except TransportError:
        return 0


ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _num_devices(), reason="no CUDA device"),
]
two = pytest.mark.skipif(_num_devices() < 2, reason="one CUDA device alone")

PEER = """
from kvxfer.cuda import cuda_region
from kvxfer.transports.cuda_ipc import CudaIpcTransport
transport = CudaIpcTransport("open sesame", host="here")
def make_region(num_blocks, block_bytes):
    return cuda_region(num_blocks, block_bytes, "{device}")
"""
TORCH_PEER = """
import torch
from kvxfer.transports.cuda_ipc import CudaIpcTransport
transport = CudaIpcTransport("open sesame", host="here")
def make_region(num_blocks, block_bytes):
    global before
    before = torch.zeros(1000, dtype=torch.uint8, device="cuda:0")
    tensor = torch.zeros(num_blocks * block_bytes, dtype=torch.uint8, device="cuda:0")
    return DeviceRegion(tensor, num_blocks, block_bytes)
"""


class OneDevice(TransportHarness):
    """Both ends on the first GPU."""

    by: By = "auto"

    def make(self) -> Transport:
        return CudaIpcTransport("open sesame", host="here", by=self.by)

    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        return cuda_region(num_blocks, block_bytes, "cuda:0")

    def peer_code(self) -> str:
        return PEER.format(device="cuda:0")

    def resources(self) -> dict[str, int]:
        import torch

        torch.cuda.synchronize()
        return {"device": torch.cuda.memory_allocated() >> 24}


class TestOneDevice(OneDevice, TransportSuite):
    def test_a_pool_of_pytorchs_allocator_is_read_from_where_it_lies(self) -> None:
        self.peer_code = lambda: TORCH_PEER  # type: ignore[method-assign]
        with self.producing() as (_, found), self.reader() as reader:
            reader.pull(found, [0, 1])
            assert set(self.read_block(reader.region, 0)) == {1}

    def test_a_dead_peers_pool_goes_without_a_read(self) -> None:
        import torch

        with self.producing(LARGE) as (process, found), self.reader(LARGE) as reader:
            reader.pull(found, [0, 1])
            (way,) = reader._transports
            assert isinstance(way, CudaIpcTransport) and way.num_opened == 1
            free = torch.cuda.mem_get_info(0)[0]
            process.kill()
            assert settles(lambda: not way._maps._maps, 10)
            # 64 MiB of blocks, and what its process needed besides.
            assert settles(lambda: torch.cuda.mem_get_info(0)[0] >= free + (64 << 20), 10)

    def test_a_stopped_peer_is_read_all_the_same(self) -> None:
        with self.producing() as (process, found), self.reader() as reader:
            reader.pull(found, [0, 1])
            process.stop()
            reader.pull(found, [2, 3], timeout_s=0.5)
            assert set(self.read_block(reader.region, 2)) == {1}

    def test_eight_threads_open_a_pool_once(self) -> None:
        with self.producing() as (_, found), self.reader(blocks=16) as reader:
            threads = [
                threading.Thread(target=reader.pull, args=(found, [2 * i, 2 * i + 1]))
                for i in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (way,) = reader._transports
            assert isinstance(way, CudaIpcTransport) and way.num_opened == 1
            assert all(set(self.read_block(reader.region, i)) == {1} for i in range(16))

    def test_steps_of_an_engine_go_on_meanwhile(self) -> None:
        """A pull ends although the default stream is busy for much longer."""
        import torch

        with self.producing() as (_, found), self.reader() as reader:
            reader.pull(found, [0, 1])
            torch.cuda.synchronize()
            torch.cuda._sleep(int(3e9))  # type: ignore[no-untyped-call]
            busy = torch.cuda.Event()
            busy.record()
            reader.pull(found, [0, 1], timeout_s=20)
            assert not busy.query()
            torch.cuda.synchronize()


@pytest.mark.skipif(not has_kernel(), reason="no Triton")
class TestOneDeviceByKernel(OneDevice, EqualitySuite, ProofSuite):
    by = "kernel"


class TestOneDeviceByEngines(OneDevice, EqualitySuite, ProofSuite):
    by = "engines"


class TestOneDeviceStaged(OneDevice, EqualitySuite, ProofSuite):
    def make(self) -> Transport:
        return CudaIpcTransport("open sesame", host="here", way="staged")

    def test_another_processs_pool_comes_in_several_turns(self) -> None:
        with self.producing(LARGE) as (_, found), self.reader(LARGE) as reader:
            from kvxfer.cuda import ways

            assert ways.STAGE_BYTES % LARGE.block_bytes == 0
            for _ in range(3):
                reader.pull(found, [0, 1])
            assert set(self.read_block(reader.region, 1)) == {1}


@two
class TestTwoDevices(OneDevice, TransportSuite):
    """The producer on the first GPU, the reader on the second."""

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return cuda_region(num_blocks, block_bytes, "cuda:1")


@two
class TestTwoDevicesByKernel(TestTwoDevices):
    by = "kernel"
    peer_code = lambda self: None  # type: ignore[assignment, return-value]  # noqa: E731


@two
class TestTwoDevicesStaged(OneDevice, EqualitySuite, ProofSuite):
    def make(self) -> Transport:
        return CudaIpcTransport("open sesame", host="here", way="staged")

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return cuda_region(num_blocks, block_bytes, "cuda:1")


class TestTcpBetweenDevices(OneDevice, EqualitySuite, ProofSuite):
    def make(self) -> Transport:
        return TcpTransport("open sesame")

    def peer_code(self) -> None:
        return None


class TestTcpToTheHost(TestTcpBetweenDevices):
    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return Region(num_blocks, block_bytes)


READER = """
import sys
from kvxfer import *
from kvxfer.cuda import cuda_region
from kvxfer.transports.cuda_ipc import CudaIpcTransport
layout = {layout}
found = KVDescriptor.from_json(sys.stdin.readline())
region = cuda_region(8, layout.block_bytes, "cuda:0")
way = CudaIpcTransport("open sesame", host="here")
consumer = KVConsumer(region, [way], layout=layout)
try:
    consumer.pull(found, [0, 1])
except TransportError as error:
    print("error", error)
else:
    (opened,) = way._maps._maps.values()
    print(opened.way.kind, set(bytes(region.block(0))) == {{1}})
"""


@two
@pytest.mark.parametrize(("mine", "peers"), [("0", "1"), ("1", "0,1"), ("1,0", "0")])
def test_processes_that_see_other_devices(
    mine: str, peers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CUDA_VISIBLE_DEVICES; "cuda:0" is another GPU for each."""
    case = OneDevice()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", peers)
    with case.producing(LARGE) as (_, found):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": mine, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", READER.format(layout=repr(LARGE))],
            input=found.to_json().decode() + "\n",
            capture_output=True,
            text=True,
            env=env,
            timeout=60,
        )
        assert done.stdout.strip() == "direct True", (done.stdout, done.stderr[-2000:])


def test_memory_of_expandable_segments_is_refused_with_the_remedy() -> None:
    code = """
import torch
from kvxfer import *
from kvxfer.transports.cuda_ipc import CudaIpcTransport
pool = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
try:
    CudaIpcTransport("s", host="here").serve(DeviceRegion(pool, 64, 1 << 20))
except KVUsageError as error:
    print(error)
"""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        env = {**os.environ, name: "expandable_segments:True", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60
        )
        if "kvxfer.cuda_region" in done.stdout:
            return
    raise AssertionError((done.stdout, done.stderr[-2000:]))


@pytest.mark.parametrize("by", ["kernel", "engines"])
def test_plans_of_every_shape(by: By) -> None:
    """Against plain copies of each piece: odd lengths, odd offsets, many spans, several moves."""
    import torch

    if by == "kernel" and not has_kernel():
        pytest.skip("no Triton")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    lanes = Lanes(0)
    for unit, src_units, dst_units in [
        *((16, 4096, 4096), (16, 96, 200), (512, 64, 32), (4, 50, 70), (1, 1000, 1500)),
        *((8, 1, 1), (4096, 512, 512), (16, 131072, 131072)),
    ]:
        src_bytes, dst_bytes = unit * src_units, unit * dst_units
        source = torch.randint(0, 256, (12 * src_bytes,), dtype=torch.uint8, device="cuda:0")
        for plan in _plans(rng, unit, src_units, dst_units):
            mine = torch.zeros(12 * dst_bytes, dtype=torch.uint8, device="cuda:0")
            want = mine.clone()
            for src, dst, size in plan.pieces():
                want[dst : dst + size] = source[src : src + size]
            torch.cuda.synchronize()
            with lanes.use() as lane:
                start(lane, plan, source.data_ptr(), mine.data_ptr(), by)
                lane.wait()
            assert torch.equal(mine, want), (by, unit, plan)
    lanes.close()


def _plans(rng: random.Random, unit: int, src_units: int, dst_units: int) -> list[ReadPlan]:
    plans = []
    if src_units == dst_units:
        plans.append(whole_blocks([3, 1, 4, 5], [9, 2, 6, 0], unit * src_units))
    for count in (1, 3):
        most = min(src_units, dst_units)
        moves = []
        targets = rng.sample(range(12), 12)
        for _ in range(2):
            spans = []
            for index in range(min(count, most)):
                size = rng.randint(1, max(1, most // count - 1))
                src = rng.randint(0, src_units - size)
                dst = index * (dst_units // count)
                spans.append(Span(src * unit, dst * unit, size * unit))
            pairs = tuple((rng.randrange(12), targets.pop()) for _ in range(4))
            moves.append(Move(tuple(spans), pairs))
        sources = tuple({src: None for move in moves for src, _ in move.pairs})
        plans.append(ReadPlan(sources, tuple(moves), unit * src_units, unit * dst_units))
    return plans


def test_a_region_of_its_own_is_zeroed_and_goes_back() -> None:
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(0)[0]
    region = cuda_region(64, 16 << 20, "cuda:0")
    assert isinstance(region, DeviceRegion) and region.device == "cuda:0"
    assert not region.tensor.any() and len(region.tensor) == 1 << 30
    view = region.tensor.view(torch.bfloat16)
    region.close()
    del region
    assert torch.cuda.mem_get_info(0)[0] < before
    assert not view.any()
    del view
    assert settles(lambda: torch.cuda.mem_get_info(0)[0] >= before - (256 << 20))
    with pytest.raises(MemoryError):
        cuda_region(1 << 20, 1 << 24, "cuda:0")


def test_the_descriptor_is_all_that_travels() -> None:
    way = CudaIpcTransport("open sesame", host="here")
    region = cuda_region(4, 4096, "cuda:0")
    address = way.serve(region)
    assert json.loads(json.dumps(address)) == address
    assert set(address) == {"host", "port", "region", "device", "pid", "start", "fd"}
    way.close()
    region.close()
