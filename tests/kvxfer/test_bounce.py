"""The ring between a device and a socket: what is in it when, and `tcp` between devices."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Mapping

import pytest
from fake_cuda import FakeCudaRegion, FakeDriver, fake_cuda

from kvxfer import Region, TcpTransport, Transport, TransportError
from kvxfer.testing import TransportSuite
from kvxfer.transports import bounce
from kvxfer.transports.bounce import Bounce, Bounces, Chunk


class LateCopies:
    """Copies nothing before it is waited for: who looks sooner sees it."""

    def __init__(self, region: Region, num_slots: int, num_bytes: int) -> None:
        self._memory = ctypes.create_string_buffer(b"\xee" * num_bytes, num_bytes)
        self.address = ctypes.addressof(self._memory)
        self._ring = memoryview(self._memory).cast("B")
        self._region = region
        self._begun: dict[int, list[tuple[bool, int, Chunk]]] = {}
        self.most = 0
        self.closed = False

    def _start(self, slot: int, to_host: bool, at: int, chunk: Chunk) -> None:
        self._begun.setdefault(slot, []).append((to_host, at, chunk))
        self.most = max(self.most, sum(map(bool, self._begun.values())))

    def to_host(self, slot: int, at: int, chunk: Chunk) -> None:
        self._start(slot, True, at, chunk)

    def to_device(self, slot: int, at: int, chunk: Chunk) -> None:
        self._start(slot, False, at, chunk)

    def wait(self, slot: int) -> None:
        for to_host, at, chunk in self._begun.pop(slot, []):
            for start, size in chunk:
                device, host = self._region.buffer[start : start + size], self._ring[at : at + size]
                if to_host:
                    host[:] = device
                else:
                    device[:] = host
                at += size

    @property
    def under_way(self) -> int:
        return sum(map(bool, self._begun.values()))

    def close(self) -> None:
        assert not self.under_way
        self.closed = True


def _pieces(rng: random.Random, num_bytes: int) -> list[tuple[int, int]]:
    cuts = sorted(rng.sample(range(num_bytes), 2 * rng.randint(1, 20)))
    pieces = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    rng.shuffle(pieces)
    return pieces


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_byte_arrives_in_order_both_ways(slots: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with_bytes, empty = Region(1, 5000), Region(1, 5000)
    with_bytes.buffer[:] = rng.randbytes(5000)
    for _ in range(100):
        pieces = _pieces(rng, 5000)
        ring = Bounce(
            with_bytes, slot_bytes=rng.choice([7, 100, 8192]), num_slots=slots, make=LateCopies
        )
        back = Bounce(
            empty, slot_bytes=rng.choice([7, 100, 8192]), num_slots=slots, make=LateCopies
        )
        empty.buffer[:] = bytes(5000)
        text = b"".join(bytes(view) for view in ring.to_host(pieces))
        assert text == b"".join(bytes(with_bytes.buffer[a : a + n]) for a, n in pieces)
        rest = memoryview(text)
        for view in back.to_device(pieces):
            view[:], rest = rest[: len(view)], rest[len(view) :]
        assert not rest
        for start, size in pieces:
            assert empty.buffer[start : start + size] == with_bytes.buffer[start : start + size]
        ring.close()
        back.close()
        back.close()


def _ring(region: Region) -> tuple[Bounce, LateCopies]:
    made: list[LateCopies] = []

    def make(*args: object) -> LateCopies:
        made.append(LateCopies(*args))  # type: ignore[arg-type]
        return made[0]

    return Bounce(region, slot_bytes=10, num_slots=3, make=make), made[0]  # type: ignore[arg-type]


def test_copies_run_while_the_caller_has_a_view() -> None:
    ring, copies = _ring(Region(1, 1000))
    views = ring.to_host([(0, 100)])
    next(views)
    next(views)
    assert copies.under_way == 2  # all slots but the caller's
    views.close()
    assert not copies.under_way
    room = ring.to_device([(0, 100)])
    next(room)
    next(room)
    next(room)
    assert copies.under_way == 2
    room.close()
    ring.close()
    assert copies.closed


def test_who_stops_early_leaves_nothing_under_way() -> None:
    ring, copies = _ring(Region(1, 1000))
    with pytest.raises(ZeroDivisionError):
        for turn, _ in enumerate(ring.to_host([(0, 100)])):
            1 // (2 - turn)
    assert not copies.under_way
    ring.close()


def test_a_ring_is_used_again_but_not_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region(1, 1000)
    made: list[LateCopies] = []

    def make(*args: object) -> LateCopies:
        made.append(LateCopies(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(bounce, "CudaCopies", make)
    rings = Bounces()
    with rings.use(region) as first:
        pass
    with rings.use(region) as second:
        assert first is second
        with rings.use(region) as third:
            assert third is not second
    with pytest.raises(TransportError), rings.use(region):
        raise TransportError("")
    assert [copies.closed for copies in made].count(True) == 1
    rings.close()
    assert all(copies.closed for copies in made)


class TestTcpBetweenDevices(TransportSuite):
    """The suite, on a driver whose devices are host memory; small slots."""

    fake: FakeDriver

    @pytest.fixture(autouse=True)
    def _driver(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(bounce, "SLOT_BYTES", 4096)
        with fake_cuda() as self.fake:
            yield

    def make(self) -> Transport:
        return TcpTransport("open sesame")

    def make_region(self, num_blocks: int, block_bytes: int) -> Region:
        return FakeCudaRegion(num_blocks, block_bytes)

    def resources(self) -> Mapping[str, int]:
        return dict(self.fake.held)


class TestTcpFromDeviceToHost(TestTcpBetweenDevices):
    def make_destination(self, num_blocks: int, block_bytes: int) -> Region:
        return Region(num_blocks, block_bytes)
