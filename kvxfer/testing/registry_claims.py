"""Publish, claim, release: each hand-off goes to one consumer, its end to its producer, once."""

from __future__ import annotations

import threading
import time

from kvxfer.testing.registry_harness import LONG_S, SHORT_S, RegistryHarness, item, of


class ClaimSuite(RegistryHarness):
    """Nothing expires here."""

    def test_own_host_first_then_in_order(self) -> None:
        """Locality goes before age, age decides among equals."""
        registry = self.make()
        registry.publish([item(i, host="a" if i % 2 else "b") for i in range(6)], LONG_S)
        assert registry.depth() == 6
        claims = registry.claim("c", "a", 4, 10**9, LONG_S)
        assert [claim.id for claim in claims] == ["i1", "i3", "i5", "i0"]
        assert [claim.descriptor for claim in claims] == [b"d1", b"d3", b"d5", b"d0"]
        assert [claim.num_bytes for claim in claims] == [100] * 4
        assert [claim.id for claim in registry.claim("c", "z", 9, 10**9, LONG_S)] == ["i2", "i4"]
        assert registry.depth() == 0

    def test_the_budget_of_bytes_holds_but_for_the_first(self) -> None:
        """A hand-off that is larger than every budget must not wait forever."""
        registry = self.make()
        registry.publish([item(i) for i in range(5)], LONG_S)
        assert len(registry.claim("c", "a", 5, 250, LONG_S)) == 2
        assert len(registry.claim("c", "a", 5, 1, LONG_S)) == 1
        assert registry.claim("c", "a", 0, 10**9, LONG_S) == []

    def test_released_and_failed_reach_their_producer_once(self) -> None:
        """With the reason, and nobody else's."""
        registry = self.make()
        registry.publish([item(0), item(1), item(2, producer="q")], LONG_S)
        first, second, third = registry.claim("c", "a", 3, 10**9, LONG_S)
        assert registry.release([of(first), ("nobody", 1)]) == ["nobody"]
        assert registry.fail([of(second)], "StaleEpoch: gone") == []
        ended = registry.collect("p", 1.0)
        assert [(end.id, end.kind, end.reason) for end in ended] == [
            ("i0", "released", ""),
            ("i1", "failed", "StaleEpoch: gone"),
        ]
        assert registry.collect("p", 0.01) == []
        assert registry.release([of(first)]) == ["i0"]
        registry.release([of(third)])
        assert [end.id for end in registry.collect("q", 1.0)] == ["i2"]

    def test_publishing_again_does_not_double(self) -> None:
        """A retry after a lost answer is safe, and takes no claim away."""
        registry = self.make()
        registry.publish([item(0)], LONG_S)
        registry.publish([item(0)], LONG_S)
        (claim,) = registry.claim("c", "a", 9, 10**9, LONG_S)
        registry.publish([item(0)], LONG_S)
        assert registry.claim("d", "a", 9, 10**9, LONG_S) == []
        assert registry.release([of(claim)]) == []

    def test_withdrawn_ones_are_gone(self) -> None:
        """Ready and claimed alike; nothing is told."""
        registry = self.make()
        registry.publish([item(0), item(1)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        registry.withdraw("p", ["i0", "i1", "i9"])
        assert registry.release([of(claim)]) == ["i0"]
        assert registry.claim("c", "a", 9, 10**9, LONG_S) == []
        assert registry.collect("p", 0.01) == []

    def test_what_another_published_is_not_touched(self) -> None:
        """A producer that is wrong about its ids does no harm."""
        registry = self.make()
        registry.publish([item(0)], LONG_S)
        registry.withdraw("q", ["i0"])
        assert registry.renew_published("q", ["i0"], SHORT_S) == ["i0"]
        assert registry.missing("q", ["i0"]) == ["i0"]
        assert registry.missing("p", ["i0"]) == []
        assert len(registry.claim("c", "a", 1, 10**9, LONG_S)) == 1

    def test_collect_wakes_at_once(self) -> None:
        """A producer waits without asking again and again; another's news do not wake it."""
        registry = self.make()
        registry.publish([item(0), item(1, producer="q")], LONG_S)
        mine, others = registry.claim("c", "a", 2, 10**9, LONG_S)
        first = threading.Timer(0.05, registry.release, ([of(others)],))
        second = threading.Timer(0.1, registry.release, ([of(mine)],))
        start = time.monotonic()
        first.start()
        second.start()
        assert [end.id for end in registry.collect("p", 20.0)] == ["i0"]
        assert time.monotonic() - start < 10
        first.join()
        second.join()

    def test_a_crowd_claims_each_once(self) -> None:
        """Eight consumers, 2,000 hand-offs: every one exactly once, and released."""
        registry = self.make()
        for start in range(0, 2000, 100):
            registry.publish([item(i) for i in range(start, start + 100)], LONG_S)
        taken: list[str] = []

        def work(name: str) -> None:
            while claims := registry.claim(name, "a", 32, 10**9, LONG_S):
                assert registry.release([of(claim) for claim in claims]) == []
                taken.extend(claim.id for claim in claims)

        threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == sorted(f"i{i}" for i in range(2000))
        ended: list[str] = []
        while more := registry.collect("p", 0.2):
            ended += [end.id for end in more]
        assert sorted(ended) == sorted(taken)
