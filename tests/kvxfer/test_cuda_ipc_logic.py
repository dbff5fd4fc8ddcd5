"""cuda_ipc on a driver that is not there: everything but what only a device can show."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from fake_cuda import FakeCudaRegion, FakeDriver, fake_cuda

from kvxfer import (
    AccessDenied,
    BadDescriptor,
    KVUsageError,
    NoTransport,
    Region,
    Revoked,
    Transport,
    TransportError,
)
from kvxfer.cuda import ways
from kvxfer.testing import TransportSuite
from kvxfer.testing.checks import settles
from kvxfer.testing.harness import at
from kvxfer.transports import cuda_ipc
from kvxfer.transports.cuda_ipc import CudaIpcTransport


class _Nothing(dict[str, Region]):
    """Keeps nothing."""

    def __setitem__(self, key: str, value: Region) -> None:
        pass


class _Faked(TransportSuite):
    fake: FakeDriver

    @pytest.fixture(autouse=True)
    def _driver(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        # Also what this process serves itself is opened by its handle.
        monkeypatch.setattr(cuda_ipc, "_served", _Nothing())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        with fake_cuda() as self.fake:
            yield

    def make(self) -> Transport:
        return CudaIpcTransport("open sesame", host="here")

    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeCudaRegion(num_blocks, block_bytes)

    def resources(self) -> Mapping[str, int]:
        return dict(self.fake.held)


class TestDirect(_Faked):
    def test_a_pool_is_opened_once_and_closed_once(self) -> None:
        with self.pair() as pair:
            described = pair.offer([1, 2])
            threads = [
                threading.Thread(target=pair.consumer.pull, args=(described, [2 * i, 2 * i + 1]))
                for i in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert isinstance(pair.transport, CudaIpcTransport)
            assert pair.transport.num_opened == self.fake.held["opened"] == 1
        assert settles(lambda: not self.fake.held["opened"])

    def test_a_revoked_pool_is_let_go_though_nobody_reads_it(self) -> None:
        with self.pair() as pair:
            pair.consumer.pull(pair.offer([1]), [0])
            assert self.fake.held["opened"] == 1
            pair.source.revoke()
            assert settles(lambda: not self.fake.held["opened"])

    def test_a_device_that_is_not_visible_is_opened_all_the_same(self) -> None:
        with self.pair() as pair:
            described = pair.offer([1, 2])
            self.fake.visible = ["GPU-c", "GPU-d"]
            pair.consumer.pull(described, [0, 1])
            pair.assert_equal([1, 2], [0, 1])

    def test_a_device_that_cannot_be_opened_is_told_with_the_reason(self) -> None:
        with self.pair() as pair:
            described = pair.offer([1, 2])
            self.fake.visible = ["GPU-c", "GPU-d"]
            self.fake.refuses = {"open"}
            with pytest.raises(TransportError, match=r"GPU-a is not among .*UNSUPPORTED \(217\)"):
                pair.consumer.pull(described, [0, 1])

    def test_an_error_of_the_device_is_told_and_its_lane_is_not_used_again(self) -> None:
        with self.pair() as pair:
            described = pair.offer([1, 2])
            pair.consumer.pull(described, [0, 1])
            self.fake.refuses = {"wait"}
            with pytest.raises(TransportError, match="ILLEGAL_ADDRESS"):
                pair.consumer.pull(described, [0, 1])
            assert not self.fake.held["stream"]
            self.fake.refuses = set()
            pair.consumer.pull(described, [0, 1])

    def test_who_does_not_know_the_secret_opens_nothing(self) -> None:
        with self.pair() as pair:
            stranger = CudaIpcTransport("open barley", host="here")
            address = pair.producer.endpoints["cuda_ipc"]
            plan_blocks = pair.offer([1])
            pair.consumer._transports[:] = [stranger]
            with pytest.raises(AccessDenied):
                pair.consumer.pull(plan_blocks, [0])
            assert not self.fake.held["opened"] and address["pid"] == os.getpid()
            stranger.close()

    def test_what_opens_a_pool_is_not_in_descriptors(self) -> None:
        with self.pair() as pair:
            text = pair.offer([1]).to_json()
            (handle,) = self.fake._handles
            assert handle.hex().encode() not in text and b"handle" not in text

    def test_another_host_is_not_reached(self) -> None:
        with self.pair() as pair, pytest.raises(NoTransport):
            pair.consumer.pull(replace(pair.offer([1]), host="elsewhere"), [0])

    def test_an_address_of_another_device_is_refused(self) -> None:
        with self.pair() as pair:
            found = pair.offer([1])
            address = {**found.parts[0].endpoints["cuda_ipc"], "device": "GPU-b"}
            with pytest.raises(BadDescriptor):
                pair.consumer.pull(at(found, {"cuda_ipc": address}), [0])

    def test_memory_that_cannot_be_exported_is_refused_with_the_remedy(self) -> None:
        self.fake.refuses = {"export"}
        with pytest.raises(KVUsageError, match=r"kvxfer\.cuda_region"):
            self.make().serve(self.make_region(4, 64))
        with pytest.raises(KVUsageError, match="on cpu"):
            self.make().serve(Region(4, 64))

    def test_a_destination_in_host_memory_is_left_to_other_transports(self) -> None:
        with self.pair() as pair:
            pair.consumer.region = Region(64, pair.layout.block_bytes)
            with pytest.raises(TransportError, match="cpu is no CUDA device"):
                pair.consumer.pull(pair.offer([1]), [0])

    def test_without_a_driver_nothing_is_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none() -> None:
            raise TransportError("no CUDA driver")

        way = self.make()
        assert way.reaches({}, "here")
        monkeypatch.setattr(cuda_ipc, "driver", none)
        assert not way.reaches({}, "here")

    def test_a_revoked_region_is_not_opened(self) -> None:
        with self.pair() as pair:
            found = pair.offer([1])
            pair.source.revoke()
            with pytest.raises(Revoked):
                pair.consumer.pull(found, [0])
            assert not self.fake.held["opened"]


class TestWithinOneProcess(_Faked):
    @pytest.fixture(autouse=True)
    def _local(self, monkeypatch: pytest.MonkeyPatch, _driver: None) -> None:
        monkeypatch.setattr(cuda_ipc, "_served", weakref.WeakValueDictionary())

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeCudaRegion(num_blocks, block_bytes, "cuda:1")

    def test_no_handle_is_opened(self) -> None:
        with self.pair() as pair:
            pair.consumer.pull(pair.offer([1, 2]), [0, 1])
            pair.assert_equal([1, 2], [0, 1])
            assert not self.fake.held["opened"] and self.fake.done["enable_access"] == 1


class TestStaged(_Faked):
    """No access between the devices; buffers so small that reads go in several turns."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch, _driver: None) -> None:
        self.fake.access = False
        monkeypatch.setattr(ways, "STAGE_BYTES", 1000)
        plain = torch.empty
        monkeypatch.setattr(
            ways, "_empty", lambda size, index: plain(size, dtype=torch.uint8), raising=True
        )

    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeCudaRegion(num_blocks, block_bytes, "cuda:1")

    def test_the_staged_way_is_taken(self) -> None:
        with self.pair() as pair:
            pair.consumer.pull(pair.offer([1, 2]), [0, 1])
            (opened,) = pair.transport._maps._maps.values()  # type: ignore[attr-defined]
            assert opened.way.kind == "staged"
