"""Peers that die, stop and vanish cost an error within the time, and nobody else anything."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial

from kvxfer import KVConsumer, TransferTimeout, TransportError
from kvxfer.testing.checks import raises
from kvxfer.testing.harness import LARGE, LAYOUTS, TransportHarness, together


class EndingSuite(TransportHarness):
    """The other end is another process."""

    def test_a_dead_producer_is_an_error_within_the_time(self) -> None:
        """Killed before the first read, or between two."""
        for reads_before in (0, 1):
            with self.producing() as (process, found), self.reader() as reader:
                for _ in range(reads_before):
                    reader.pull(found, [0, 1], timeout_s=10)
                    assert self.read_block(reader.region, 0) == b"\x01" * LAYOUTS[0].block_bytes
                process.kill()
                start = time.monotonic()
                raises(TransportError, partial(reader.pull, found, [0, 1], timeout_s=5))
                assert time.monotonic() - start < 6

    def test_a_producer_that_dies_in_mid_read_is_an_error_within_the_time(self) -> None:
        """Four readers pull blocks of 8 MiB without a pause when it is killed."""
        with self.producing(LARGE) as (process, found), self.reader(LARGE) as reader:
            reading = threading.Barrier(5)
            died: list[float] = []

            def pull(first: int) -> None:
                reader.pull(found, [first, first + 1], timeout_s=20)
                reading.wait(20)
                with contextlib.suppress(TransportError):
                    while True:
                        reader.pull(found, [first, first + 1], timeout_s=20)
                died.append(time.monotonic())

            def kill() -> None:
                reading.wait(20)
                process.kill()
                died.append(time.monotonic())

            errors = together([*(partial(pull, 2 * i) for i in range(4)), kill])
            assert not errors, errors
            assert len(died) == 5 and max(died) - min(died) < 20
            ones = b"\x01" * LARGE.block_bytes
            assert self.read_block(reader.region, 0) == ones  # what was proved is still there

    def test_a_stopped_producer_costs_at_most_the_timeout(self) -> None:
        """Read all the same, or an error in time; and read again once it runs on."""
        with self.producing() as (process, found), self.reader() as reader:
            reader.pull(found, [0, 1], timeout_s=10)
            process.stop()
            start = time.monotonic()
            with contextlib.suppress(TransferTimeout):
                reader.pull(found, [0, 1], timeout_s=0.5)
            assert time.monotonic() - start < 2
            process.go_on()
            reader.pull(found, [0, 1], timeout_s=10)

    def test_a_dead_reader_leaves_the_producer_well(self) -> None:
        """Readers that vanish in the middle of their reads; nothing is kept for them."""
        with self.pair() as pair:
            described = pair.offer([3, 1])
            pair.consumer.pull(described, [0, 1])
            before = self.holdings()
            for _ in range(3):
                with self.reading(pair.layout, described) as reader:
                    reader.kill()
            pair.consumer.pull(described, [0, 1])
            pair.assert_equal([3, 1], [0, 1])
            self.assert_settles(before)

    def test_a_producer_that_comes_back_is_read_again(self) -> None:
        """One consumer outlives three lives of its producer, and keeps nothing of the dead."""
        with self.reader() as reader:
            self._one_life(reader)
            before = self.holdings()
            for _ in range(3):
                self._one_life(reader)
            self.assert_settles(before)

    def _one_life(self, reader: KVConsumer) -> None:
        with self.producing() as (process, found):
            reader.pull(found, [0, 1], timeout_s=10)
            process.kill()
            raises(TransportError, partial(reader.pull, found, [0, 1], timeout_s=5))
