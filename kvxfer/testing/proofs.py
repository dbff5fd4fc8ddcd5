"""No read that is not proved passes for one, and no misuse moves a byte."""

from __future__ import annotations

import itertools
import threading
from functools import partial

from kvxfer import (
    BadDescriptor,
    KVDescriptor,
    KVTransferError,
    KVUsageError,
    LayoutMismatch,
    PoolExhausted,
    Revoked,
    StaleEpoch,
    StaleGeneration,
    TokenMismatch,
)
from kvxfer.testing.checks import raises
from kvxfer.testing.harness import LAYOUTS, NUM_BLOCKS, Pair, TransportHarness, at, of_blocks


class ProofSuite(TransportHarness):
    """Reuse, new lives, revocation; wrong layouts, tables and addresses."""

    def test_a_reused_block_is_noticed(self) -> None:
        """Given to other content after the descriptor was made."""
        with self.pair() as pair:
            described = pair.offer([1, 2, 3])
            pair.source.bump([2])
            raises(StaleGeneration, lambda: pair.consumer.pull(described, [0, 1, 2]))
            fresh = pair.offer([1, 2, 3], "y")
            pair.consumer.pull(fresh, [0, 1, 2])

    def test_a_lease_that_ended_is_noticed(self) -> None:
        """The producer let go of the blocks, and another sequence got one of them."""
        with self.pair() as pair:
            described = pair.offer([1, 2, 3])
            pair.consumer.pull(described, [0, 1, 2])
            assert pair.producer.unpin("x") == (1, 2, 3)
            pair.source.bump([3])
            self.write_block(pair.source, 3, b"\x05" * pair.layout.block_bytes)
            raises(StaleGeneration, lambda: pair.consumer.pull(described, [0, 1, 2]))

    def test_no_read_that_overlaps_a_reuse_passes(self) -> None:
        """A writer reuses blocks all the time; whatever is proved holds one content alone."""
        layout = LAYOUTS[2]
        with self.pair(layout) as pair:
            stop, turn_of = threading.Event(), threading.Condition()
            is_wanted = False
            blocks, values = list(range(16)), itertools.cycle(range(250))
            now = b""

            def write() -> None:
                nonlocal now
                now = bytes([next(values)]) * layout.block_bytes
                pair.source.bump(blocks)
                for block in blocks:
                    self.write_block(pair.source, block, now)

            def keep_writing() -> None:
                while not stop.is_set():
                    with turn_of:  # a lock alone might never come round to the reader
                        turn_of.wait_for(lambda: not is_wanted, timeout=20)
                        write()

            write()
            thread = threading.Thread(target=keep_writing)
            thread.start()
            proved = 0
            try:
                for turn in range(300):
                    is_wanted = True
                    with turn_of:  # descriptors are made by the owner, between its writes
                        described, expected = pair.offer(blocks, str(turn)), now
                        is_wanted = False
                        turn_of.notify()
                    try:
                        pair.consumer.pull(described, blocks)
                    except StaleGeneration:
                        continue
                    finally:
                        pair.producer.unpin(str(turn))
                    proved += 1
                    for block in blocks:
                        assert self.read_block(pair.destination, block) == expected
            finally:
                stop.set()
                with turn_of:
                    is_wanted = False
                    turn_of.notify()
                thread.join()
            print(f"{proved} of 300 reads were proved")
            described = pair.offer(blocks, "last")
            pair.consumer.pull(described, blocks)
            pair.assert_equal(blocks, blocks)

    def test_another_life_of_the_producer_is_noticed(self) -> None:
        """Every descriptor of an earlier epoch is stale."""
        with self.pair() as pair:
            described = pair.offer([1])
            pair.consumer.pull(described, [0])
            pair.producer.reset(8)
            raises(StaleEpoch, lambda: pair.consumer.pull(described, [0]))
            pair.consumer.pull(pair.offer([1]), [0])

    def test_a_revoked_region_cannot_be_read(self) -> None:
        """Neither by a peer that never read it nor by one that did."""
        with self.pair() as pair, self.reader() as stranger:
            described = pair.offer([1])
            pair.consumer.pull(described, [0])
            pair.source.revoke()
            raises(Revoked, lambda: pair.consumer.pull(described, [0]))
            raises(Revoked, lambda: stranger.pull(described, [0]))

    def test_a_region_that_is_revoked_in_mid_read_ends_the_reads(self) -> None:
        """Pulls without a pause: proved until then, Revoked from then on."""
        with self.pair() as pair:
            blocks = list(range(NUM_BLOCKS))
            described = pair.offer(blocks)
            began = threading.Event()
            errors: list[BaseException] = []

            def pull() -> None:
                try:
                    while True:
                        pair.consumer.pull(described, blocks)
                        began.set()
                except BaseException as error:
                    errors.append(error)
                    began.set()

            thread = threading.Thread(target=pull)
            thread.start()
            began.wait(20)
            pair.source.revoke()
            thread.join(20)
            assert [type(error) for error in errors] == [Revoked], errors
            raises(Revoked, lambda: pair.consumer.pull(described, blocks))

    def test_a_wrong_layout_is_refused_before_the_read(self) -> None:
        """Nothing is moved between pools of different shapes."""
        with self.pair(LAYOUTS[0]) as pair, self.pair(LAYOUTS[2]) as other:
            described = pair.offer([1])
            before = self.read_block(other.destination, 0)
            raises(LayoutMismatch, lambda: other.consumer.pull(described, [0]))
            assert self.read_block(other.destination, 0) == before

    def test_too_few_destination_blocks_are_refused(self) -> None:
        """The pool at the reader's end is exhausted."""
        with self.pair() as pair:
            described = pair.offer([1, 2, 3])
            raises(PoolExhausted, lambda: pair.consumer.pull(described, [0, 1]))
            raises(PoolExhausted, lambda: pair.consumer.pull(described, []))

    def test_other_tokens_are_noticed(self) -> None:
        """The hash in the descriptor is that of the tokens."""
        with self.pair() as pair:
            described = pair.offer([1])
            described.prove_tokens(range(pair.layout.block_size))
            raises(TokenMismatch, lambda: described.prove_tokens([1, 2, 3]))

    def test_blocks_that_are_not_there_are_refused(self) -> None:
        """Neither end touches memory outside of its region."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            for blocks in ([1, NUM_BLOCKS], [1, 2**31]):
                wrong = of_blocks(described, blocks)
                raises(BadDescriptor, partial(pair.consumer.pull, wrong, [0, 1]))
            for into in ([0, NUM_BLOCKS], [-1, 0]):
                raises(KVUsageError, partial(pair.consumer.pull, described, into))
            pair.consumer.pull(described, [0, 1])
            pair.assert_equal([1, 2], [0, 1])

    def test_an_address_of_nonsense_is_an_error_of_ours(self) -> None:
        """Every field missing, null, negative, huge or of another type, one at a time."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            nonsense: list[object] = [None, -1, 2**70, "nobody", [], {}]
            for name, address in pair.producer.endpoints.items():
                for field in address:
                    for value in nonsense:
                        wrong = at(described, {name: {**address, field: value}})
                        raises(KVTransferError, partial(self._pull, pair, wrong))
                    rest = {key: found for key, found in address.items() if key != field}
                    raises(KVTransferError, partial(self._pull, pair, at(described, {name: rest})))
            pair.consumer.pull(described, [0, 1])

    @staticmethod
    def _pull(pair: Pair, descriptor: KVDescriptor) -> None:
        pair.consumer.pull(descriptor, [0, 1], timeout_s=0.5)
