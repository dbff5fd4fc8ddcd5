"""The suite over every transport of this machine, and what is special about each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

import pytest

from kvxfer import (
    AccessDenied,
    KVDescriptor,
    MemTransport,
    NoTransport,
    PeerLost,
    ShmTransport,
    StaleEpoch,
    StaleGeneration,
    TcpTransport,
    TransferTimeout,
    Transport,
)
from kvxfer.testing import TransportSuite
from kvxfer.testing.transports import LAYOUTS
from kvxfer.transports import Fault


class TestMem(TransportSuite):
    def make(self) -> Transport:
        return MemTransport()

    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            (Fault("drop", 0.05), TransferTimeout),
            (Fault("die"), PeerLost),
            (Fault("stale_epoch"), StaleEpoch),
            (Fault("reuse"), StaleGeneration),
        ],
    )
    def test_faults_on_order(self, fault: Fault, error: type[Exception]) -> None:
        with self.pair() as pair:
            way = pair.consumer._transports[0]
            assert isinstance(way, MemTransport)
            way.faults.append(fault)
            with pytest.raises(error):
                pair.consumer.pull(pair.offer([1, 2]), [3, 4], timeout_s=0.05)
            pair.consumer.pull(pair.offer([1, 2], "y"), [3, 4])
            pair.assert_equal([1, 2], [3, 4])

    def test_corruption_is_visible_to_those_who_compare(self) -> None:
        with self.pair() as pair:
            way = pair.consumer._transports[0]
            assert isinstance(way, MemTransport)
            way.faults.append(Fault("corrupt"))
            pair.consumer.pull(pair.offer([1]), [3])
            assert pair.source.block(1) != pair.destination.block(3)


class TestShm(TransportSuite):
    def make(self) -> Transport:
        return ShmTransport("here")

    def peer_code(self) -> str:
        return "transport = ShmTransport('here')"

    def test_another_host_is_not_reached(self) -> None:
        with self.pair() as pair:
            text = pair.offer([1]).to_json().replace(b'"host":"here"', b'"host":"elsewhere"')
            with pytest.raises(NoTransport, match="shm"):
                pair.consumer.pull(KVDescriptor.from_json(text), [0])

    def test_a_reused_process_id_is_another_process(self) -> None:
        with self.pair() as pair:
            described = pair.offer([1])
            start = described.endpoints["shm"]["start"]
            text = described.to_json().replace(f'"{start}"'.encode(), b'"1"')
            with pytest.raises(PeerLost, match="is gone"):
                pair.consumer.pull(KVDescriptor.from_json(text), [0])


class TestTcp(TransportSuite):
    def make(self) -> Transport:
        return TcpTransport("open sesame")

    def peer_code(self) -> str:
        return "transport = TcpTransport('open sesame')"

    def test_who_does_not_know_the_secret_reads_nothing(self) -> None:
        with self.pair() as pair:
            stranger = TcpTransport("open barley")
            pair.consumer._transports[:] = [stranger]
            before = bytes(pair.destination.buffer)
            with pytest.raises(AccessDenied):
                pair.consumer.pull(pair.offer([1]), [0])
            assert pair.destination.buffer == before
            stranger.close()

    def test_garbage_costs_the_sender_its_connection_alone(self) -> None:
        with self.pair() as pair:
            address = pair.producer.endpoints["tcp"]
            with socket.create_connection((address["host"], address["port"])) as sock:
                sock.settimeout(10)
                sock.sendall(os.urandom(4096))
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(4096):
                        pass
            pair.consumer.pull(pair.offer([1]), [0])
            pair.assert_equal([1], [0])

    def test_it_listens_on_the_loopback(self) -> None:
        with self.pair() as pair:
            assert pair.producer.endpoints["tcp"]["host"] == "127.0.0.1"

    def test_a_stopped_peer_is_a_timeout_and_a_woken_one_serves_again(self) -> None:
        with self.peer(self.peer_code(), LAYOUTS[0]) as (process, text), self.reader() as reader:
            descriptor = KVDescriptor.from_json(text)
            reader.pull(descriptor, [0, 1])
            process.send_signal(signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(TransferTimeout):
                reader.pull(descriptor, [0, 1], timeout_s=0.5)
            assert time.monotonic() - start < 2
            process.send_signal(signal.SIGCONT)
            reader.pull(descriptor, [0, 1], timeout_s=10)
