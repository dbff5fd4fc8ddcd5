"""What every registry must do, as tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvxfer.registry import Claim, Publication, Registry

T = TypeVar("T")
LONG_S = 60.0
SHORT_S = 0.15


class RegistrySuite:
    """Subclass it; give `make` (an empty registry at each call) and `empty`."""

    def make(self) -> Registry:
        """A registry without entries."""
        raise NotImplementedError

    def empty(self, registry: Registry) -> None:
        """Take everything away, as an administrator or a crash would."""
        raise NotImplementedError

    def test_own_host_first_then_in_order(self) -> None:
        """Locality goes before age, age decides among equals."""
        registry = self.make()
        registry.publish([_item(i, host="a" if i % 2 else "b") for i in range(6)], LONG_S)
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
        registry.publish([_item(i) for i in range(5)], LONG_S)
        assert len(registry.claim("c", "a", 5, 250, LONG_S)) == 2
        assert len(registry.claim("c", "a", 5, 1, LONG_S)) == 1
        assert registry.claim("c", "a", 0, 10**9, LONG_S) == []

    def test_released_and_failed_reach_their_producer_once(self) -> None:
        """With the reason, and nobody else's."""
        registry = self.make()
        registry.publish([_item(0), _item(1), _item(2, producer="q")], LONG_S)
        first, second, third = registry.claim("c", "a", 3, 10**9, LONG_S)
        assert registry.release([_of(first), ("nobody", 1)]) == ["nobody"]
        assert registry.fail([_of(second)], "StaleEpoch: gone") == []
        ended = registry.collect("p", 1.0)
        assert [(end.id, end.kind, end.reason) for end in ended] == [
            ("i0", "released", ""),
            ("i1", "failed", "StaleEpoch: gone"),
        ]
        assert registry.collect("p", 0.01) == []
        assert registry.release([_of(first)]) == ["i0"]
        registry.release([_of(third)])
        assert [end.id for end in registry.collect("q", 1.0)] == ["i2"]

    def test_a_claim_that_expired_goes_to_another_and_its_owner_is_refused(self) -> None:
        """Fences: the old owner can neither renew, release nor fail."""
        registry = self.make()
        registry.publish([_item(0)], LONG_S)
        (old,) = registry.claim("c", "a", 1, 10**9, SHORT_S)
        new = _eventually(lambda: registry.claim("d", "a", 1, 10**9, LONG_S))[0]
        assert new.id == old.id and new.fence > old.fence
        assert registry.renew([_of(old)], LONG_S) == ["i0"]
        assert registry.release([_of(old)]) == ["i0"]
        assert registry.fail([_of(old)], "late") == ["i0"]
        assert registry.renew([_of(new)], LONG_S) == []
        assert registry.release([_of(new)]) == []

    def test_a_renewed_claim_stays(self) -> None:
        """As long as its owner says so."""
        registry = self.make()
        registry.publish([_item(0)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, 10 * SHORT_S)
        assert registry.renew([_of(claim)], LONG_S) == []
        _wait(12 * SHORT_S)
        assert registry.claim("d", "a", 1, 10**9, LONG_S) == []
        assert registry.release([_of(claim)]) == []

    def test_a_publication_that_expired_is_told(self) -> None:
        """Ready or claimed: the producer's lease is the outer one."""
        registry = self.make()
        registry.publish([_item(0), _item(1)], SHORT_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        _eventually(lambda: registry.sweep() or registry.depth() == 0)
        ended = _eventually(lambda: registry.collect("p", 0.05))
        assert {end.kind for end in ended} == {"expired"}
        assert registry.release([_of(claim)]) == ["i0"]

    def test_renewed_publications_stay_and_unknown_ones_are_named(self) -> None:
        """A producer finds out by its renewal what was forgotten."""
        registry = self.make()
        registry.publish([_item(0), _item(1)], LONG_S)
        assert registry.renew_published("p", ["i0", "i1", "i9"], LONG_S) == ["i9"]
        assert registry.missing("p", ["i0", "i9"]) == ["i9"]
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        registry.release([_of(claim)])
        assert registry.missing("p", ["i0", "i1"]) == []  # i0 waits to be collected
        registry.collect("p", 1.0)
        assert registry.missing("p", ["i0", "i1"]) == ["i0"]

    def test_publishing_again_does_not_double(self) -> None:
        """A retry after a lost answer is safe, and takes no claim away."""
        registry = self.make()
        registry.publish([_item(0)], LONG_S)
        registry.publish([_item(0)], LONG_S)
        (claim,) = registry.claim("c", "a", 9, 10**9, LONG_S)
        registry.publish([_item(0)], LONG_S)
        assert registry.claim("d", "a", 9, 10**9, LONG_S) == []
        assert registry.release([_of(claim)]) == []

    def test_withdrawn_ones_are_gone(self) -> None:
        """Ready and claimed alike; nothing is told."""
        registry = self.make()
        registry.publish([_item(0), _item(1)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        registry.withdraw("p", ["i0", "i1", "i9"])
        assert registry.release([_of(claim)]) == ["i0"]
        assert registry.claim("c", "a", 9, 10**9, LONG_S) == []
        assert registry.collect("p", 0.01) == []

    def test_emptied_at_any_moment(self) -> None:
        """What was there is refused or missing, what comes is taken."""
        registry = self.make()
        registry.publish([_item(0), _item(1)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        self.empty(registry)
        assert registry.renew([_of(claim)], LONG_S) == ["i0"]
        assert registry.release([_of(claim)]) == ["i0"]
        assert registry.missing("p", ["i0", "i1"]) == ["i0", "i1"]
        registry.publish([_item(0)], LONG_S)
        (again,) = registry.claim("c", "a", 9, 10**9, LONG_S)
        assert registry.release([_of(again)]) == []

    def test_collect_wakes_at_once(self) -> None:
        """A producer waits without asking again and again."""
        registry = self.make()
        registry.publish([_item(0)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        timer = threading.Timer(0.1, registry.release, ([_of(claim)],))
        start = time.monotonic()
        timer.start()
        assert [end.id for end in registry.collect("p", 20.0)] == ["i0"]
        assert time.monotonic() - start < 10
        timer.join()

    def test_a_crowd_claims_each_once(self) -> None:
        """Eight consumers, 2,000 hand-offs: every one exactly once, and released."""
        registry = self.make()
        for start in range(0, 2000, 100):
            registry.publish([_item(i) for i in range(start, start + 100)], LONG_S)
        taken: list[str] = []

        def work(name: str) -> None:
            while claims := registry.claim(name, "a", 32, 10**9, LONG_S):
                assert registry.release([_of(claim) for claim in claims]) == []
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


def _item(i: int, host: str = "a", producer: str = "p") -> Publication:
    return Publication(f"i{i}", producer, host, 100, b"d%d" % i)


def _of(claim: Claim) -> tuple[str, int]:
    return claim.id, claim.fence


def _wait(seconds: float) -> None:
    """Let a lease run; leases are time, so a test of them has to."""
    threading.Event().wait(seconds)


def _eventually(work: Callable[[], T], timeout_s: float = 10.0) -> T:
    deadline = time.monotonic() + timeout_s
    while not (found := work()):
        assert time.monotonic() < deadline, "it never came true"
        _wait(0.01)
    return found
