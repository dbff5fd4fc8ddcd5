"""Nothing is kept of transfers that are over."""

from __future__ import annotations

from kvxfer.testing.harness import TransportHarness

NUM_TRANSFERS = 10_000


class LeakSuite(TransportHarness):
    """Files, threads, mappings, and whatever `resources` counts."""

    def test_short_transfers_leak_nothing(self) -> None:
        """Ten thousand, over one pair."""
        with self.pair() as pair:
            described = pair.offer([1, 2])
            pair.consumer.pull(described, [0, 1])
            before = self.holdings()
            for turn in range(NUM_TRANSFERS):
                pair.consumer.pull(described, [turn % 32, 32 + turn % 32])
            pair.assert_equal([1, 2], [turn % 32, 32 + turn % 32])
            self.assert_settles(before)

    def test_pairs_leak_nothing(self) -> None:
        """Ends that come, read once and go."""
        self._one_pair()
        before = self.holdings()
        for _ in range(20):
            self._one_pair()
        self.assert_settles(before)

    def test_transports_that_were_never_used_leak_nothing(self) -> None:
        """Made and closed; closed twice."""
        self.make().close()
        before = self.holdings()
        for _ in range(20):
            way = self.make()
            way.close()
            way.close()
        self.assert_settles(before)

    def _one_pair(self) -> None:
        with self.pair() as pair:
            pair.consumer.pull(pair.offer([1]), [0])
