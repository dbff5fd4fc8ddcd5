"""tcp over a network that cuts, stalls and trickles; and with readers that stop reading."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvxfer import (
    KVConsumer,
    KVDescriptor,
    KVLayout,
    KVProducer,
    PeerLost,
    Region,
    TcpTransport,
    TransferTimeout,
    TransportError,
)
from kvxfer.testing.harness import at
from kvxfer.testing.proxy import NetFault, Proxy
from kvxfer.transports import wire
from kvxfer.transports.tcp_server import PIECE, REQUEST

SECRET = "open sesame"
BLOCKS = [3, 1, 6, 7]
INTO = [0, 5, 2, 3]


def layout_of(head_dim: int) -> KVLayout:
    return KVLayout(
        model="m",
        dtype="uint8",
        itemsize=1,
        block_size=1,
        num_layers=1,
        num_kv_heads=1,
        head_dim=head_dim,
    )


class Ends:
    """A producer, a consumer, and the proxy that lies between them."""

    def __init__(self, head_dim: int, patience_s: float) -> None:
        layout = layout_of(head_dim)
        self.source, self.mine = (Region(8, layout.block_bytes) for _ in range(2))
        for block in range(8):
            self.source.block(block)[:] = bytes([block + 1]) * layout.block_bytes
        way = TcpTransport(SECRET, patience_s=patience_s)
        self.producer = KVProducer(
            self.source, [way], layout=layout, producer="p#1", host="h", epoch=1
        )
        self.consumer = KVConsumer(self.mine, [TcpTransport(SECRET)], layout=layout)
        self.direct = self.producer.pin("x", BLOCKS, range(4))
        address = self.direct.parts[0].endpoints["tcp"]
        self.proxy = Proxy(address["host"], address["port"])

    def through(self) -> KVDescriptor:
        address = {**self.direct.parts[0].endpoints["tcp"], "port": self.proxy.port}
        return at(self.direct, {"tcp": address})

    def pull(self, timeout_s: float = 10.0) -> None:
        self.mine.buffer[:] = bytes(len(self.mine.buffer))
        self.consumer.pull(self.through(), INTO, timeout_s=timeout_s)
        for src, dst in zip(BLOCKS, INTO, strict=True):
            assert self.mine.block(dst) == self.source.block(src)


@contextmanager
def ends(head_dim: int = 4096, patience_s: float = 60.0) -> Iterator[Ends]:
    found = Ends(head_dim, patience_s)
    with found.proxy:
        yield found
    found.consumer.close()
    found.producer.close()


def num_peers() -> int:
    """Threads of servers in this process that wait on a reader."""
    return sum(thread.name == "kvxfer-tcp-peer" for thread in threading.enumerate())


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)


@pytest.mark.parametrize("kind", ["cut", "stall", "trickle"])
def test_a_break_at_any_byte_is_an_error_in_time_and_the_next_read_is_whole(kind: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with ends() as both:
        both.pull()
        size = both.proxy.num_bytes
        assert size > 4 * both.source.block_bytes
        places = [0, 1, size - 1, *(rng.randrange(size) for _ in range(5 if kind != "cut" else 30))]
        for place in places:
            both.consumer.close()  # the fault is for a fresh connection
            both.proxy.fault = NetFault(kind, place)  # type: ignore[arg-type]
            start = time.monotonic()
            late = TransferTimeout if kind != "cut" else TransportError
            # a trickle of the few last bytes is a success
            if kind == "trickle" and size - place < 20:
                both.pull(timeout_s=5)
            else:
                with pytest.raises(late):
                    both.pull(timeout_s=5 if kind == "cut" else 0.3)
            assert time.monotonic() - start < 2, place
            both.proxy.fault = None
            both.consumer.close()
            both.pull()
        both.consumer.close()
        wait_for(lambda: num_peers() == 0)


def test_a_cut_in_the_middle_of_the_blocks_is_a_lost_peer() -> None:
    with ends() as both:
        both.proxy.fault = NetFault("cut", 2 * both.source.block_bytes)
        with pytest.raises(PeerLost):
            both.pull()


def test_a_kept_connection_that_died_meanwhile_is_replaced() -> None:
    with ends() as both:
        both.pull()
        both.proxy.drop()
        both.pull()


def test_readers_that_give_up_leave_no_thread_at_the_server() -> None:
    """Large blocks: the server is in the middle of sending when the reader leaves."""
    with ends(head_dim=4 << 20) as both:
        both.proxy.fault = NetFault("stall", 1 << 20)
        with pytest.raises(TransferTimeout):
            both.pull(timeout_s=0.5)
        assert num_peers() <= 1
        wait_for(lambda: num_peers() == 0)
        both.proxy.fault = None
        both.pull()


def test_a_stopped_reader_costs_other_readers_nothing() -> None:
    """Stopped in the middle of reads of 32 MiB; the server's thread for it waits in the kernel."""
    with ends(head_dim=4 << 20) as both:
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER.format(layout=layout_of(4 << 20), secret=SECRET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert reader.stdin is not None and reader.stdout is not None
            reader.stdin.write(both.direct.to_json() + b"\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == b"reading\n"
            reader.send_signal(signal.SIGSTOP)
            start = time.monotonic()
            for _ in range(5):
                both.pull()
            assert time.monotonic() - start < 5
        finally:
            reader.kill()
            reader.communicate()
        both.consumer.close()
        wait_for(lambda: num_peers() == 0)


@pytest.mark.parametrize("says", ["nothing", "half a handshake", "half a request", "no recv"])
def test_readers_that_stall_lose_their_connection_after_the_patience(says: str) -> None:
    with ends(head_dim=4 << 20, patience_s=0.3) as both:
        address = both.direct.parts[0].endpoints["tcp"]
        with socket.create_connection((address["host"], address["port"])) as sock:
            wait_for(lambda: num_peers() == 1)
            if says == "half a handshake":
                sock.sendall(b"x")
            elif says != "nothing":
                wire.introduce(sock, SECRET.encode(), time.monotonic() + 10)
                head = REQUEST.pack(both.source.id.encode(), 1, 0) + PIECE.pack(
                    0, both.source.num_bytes
                )
                sock.sendall(head[:-1] if says == "half a request" else head)
            both.pull()
            both.consumer.close()
            wait_for(lambda: num_peers() == 0)


def test_a_reader_that_only_waits_keeps_its_connection() -> None:
    with ends(patience_s=0.1) as both:
        both.pull()
        (peer,) = (t for t in threading.enumerate() if t.name == "kvxfer-tcp-peer")
        peer.join(0.5)
        assert peer.is_alive()
        both.pull()
        assert peer.is_alive() and num_peers() == 1


_READER = """
import sys
from kvxfer import *
layout = {layout!r}
consumer = KVConsumer(Region(8, layout.block_bytes), [TcpTransport("{secret}")], layout=layout)
descriptor = KVDescriptor.from_json(sys.stdin.readline())
consumer.pull(descriptor, [0, 1, 2, 3])
print("reading", flush=True)
while True:
    consumer.pull(descriptor, [0, 1, 2, 3])
"""
