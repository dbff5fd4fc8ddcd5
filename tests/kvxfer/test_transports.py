"""The suite over every transport of this machine, and what is special about each."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from kvxfer import (
    AccessDenied,
    KVDescriptor,
    KVUsageError,
    MemTransport,
    NoTransport,
    PeerLost,
    Region,
    ShmTransport,
    StaleEpoch,
    StaleGeneration,
    TcpTransport,
    TransferTimeout,
    Transport,
)
from kvxfer.testing import TransportSuite
from kvxfer.testing.checks import holdings, settles
from kvxfer.testing.harness import LARGE, LAYOUTS, NUM_BLOCKS, at
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

    def test_a_reused_descriptor_number_is_another_region(self) -> None:
        """A new region where the old one's file was, with equal shape, epoch and generations."""
        with self.pair() as pair:
            described = pair.offer([1])
            number = described.parts[0].endpoints["shm"]["fd"]
            pair.source.close()
            usurper = Region(NUM_BLOCKS, pair.layout.block_bytes, epoch=described.parts[0].epoch)
            if usurper.fd != number:
                os.dup2(usurper.fd, number)
            with pytest.raises(PeerLost, match="no longer the region"):
                pair.consumer.pull(described, [0])
            if usurper.fd != number:
                os.close(number)
            usurper.close()

    def test_a_dead_peers_memory_goes_back_without_a_read(self) -> None:
        with (
            self.producing(LARGE) as (process, found),
            self.reader(LARGE) as reader,
        ):
            before = holdings()
            reader.pull(found, [0, 1])
            assert holdings().mappings == before.mappings + 1
            process.kill()
            assert settles(lambda: holdings().mappings == before.mappings), (before, holdings())
            assert settles(lambda: holdings().files == before.files), (before, holdings())

    def test_a_stopped_peer_is_read_all_the_same(self) -> None:
        with (
            self.producing() as (process, found),
            self.reader() as reader,
        ):
            process.stop()
            reader.pull(found, [0, 1], timeout_s=0.5)
            assert reader.region.block(1) == b"\x01" * LAYOUTS[0].block_bytes

    def test_readers_cannot_write(self) -> None:
        with self.pair() as pair:
            pair.consumer.pull(pair.offer([1]), [0])
            lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
            ours = [line for line in lines if f"memfd:kvxfer-{pair.source.id}" in line]
            assert sorted(line.split()[1] for line in ours) == ["r--s", "rw-s"], ours

    def test_a_private_region_is_refused(self) -> None:
        with pytest.raises(KVUsageError, match="shared"):
            ShmTransport("here").serve(Region(1, 8, shared=False))

    def test_a_reused_process_id_is_another_process(self) -> None:
        with self.pair() as pair:
            described = pair.offer([1])
            start = described.parts[0].endpoints["shm"]["start"]
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

    def test_a_stopped_peer_is_a_timeout(self) -> None:
        with (
            self.producing() as (process, found),
            self.reader() as fresh,
            self.reader() as known,
        ):
            known.pull(found, [0, 1])
            process.stop()
            for reader in (known, fresh):
                start = time.monotonic()
                with pytest.raises(TransferTimeout):
                    reader.pull(found, [0, 1], timeout_s=0.5)
                assert 0.4 < time.monotonic() - start < 2

    def test_another_service_on_the_port_is_a_lost_peer(self) -> None:
        with self.pair() as pair, socket.create_server(("127.0.0.1", 0)) as other:
            found = pair.offer([1])
            endpoints = {"tcp": {**found.parts[0].endpoints["tcp"], "port": other.getsockname()[1]}}

            def greet() -> None:
                with other.accept()[0] as sock:
                    sock.sendall(b"220 mail.example.org ESMTP ready when you are\r\n")
                    with contextlib.suppress(ConnectionResetError):
                        sock.recv(1)

            thread = threading.Thread(target=greet)
            thread.start()
            with pytest.raises(PeerLost, match="something else"):
                pair.consumer.pull(at(found, endpoints), [0])
            thread.join()

    def test_the_secret_is_neither_sent_nor_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(0)
        with self.pair() as pair, socket.create_server(("127.0.0.1", 0)) as proxy:
            found = pair.offer([1])
            real = found.parts[0].endpoints["tcp"]
            seen = bytearray()

            def carry(source: socket.socket, target: socket.socket) -> None:
                while data := source.recv(65536):
                    seen.extend(data)
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

            def between() -> None:
                ours = socket.create_connection((real["host"], real["port"]))
                theirs, _ = proxy.accept()
                back = threading.Thread(target=carry, args=(ours, theirs))
                back.start()
                carry(theirs, ours)
                back.join()
                ours.close()
                theirs.close()

            thread = threading.Thread(target=between)
            thread.start()
            endpoints = {"tcp": {**real, "port": proxy.getsockname()[1]}}
            pair.consumer.pull(at(found, endpoints), [0])
            pair.assert_equal([1], [0])
            pair.consumer.close()
            thread.join(10)
            assert len(seen) > pair.layout.block_bytes
            assert b"sesame" not in seen and b"sesame" not in found.to_json()
            assert "sesame" not in caplog.text

    def test_a_way_that_fails_is_left_for_the_next_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with self.pair() as pair:
            found = pair.offer([1])
            gone = {"pid": 2**22 + 1, "start": "1", "fd": 3, "region": "00"}
            both = at(found, {"shm": gone, **found.parts[0].endpoints})
            pair.consumer._transports.insert(0, ShmTransport("here"))
            assert pair.consumer.pull(both, [0]).transport == "tcp"
            assert "shm failed (PeerLost, errno" in caplog.text
