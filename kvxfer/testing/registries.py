"""What every registry must do, as tests."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvxfer.errors import KVUsageError
from kvxfer.memory_registry import MemoryRegistry
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

    def test_whoever_waits_is_told_of_what_expires_meanwhile(self) -> None:
        """Nobody else has to call anything."""
        registry = self.make()
        registry.publish([_item(0)], SHORT_S)
        assert [(end.id, end.kind) for end in registry.collect("p", 20.0)] == [("i0", "expired")]

    def test_many_that_expire_at_once(self) -> None:
        """More than one sweep takes: all are told in the end, none is claimed or kept late."""
        registry, names = self.make(), [f"i{i}" for i in range(1500)]
        registry.publish([_item(i) for i in range(1500)], LONG_S)
        old = registry.claim("c", "a", 1500, 10**9, SHORT_S)
        assert len(old) == 1500
        _wait(2 * SHORT_S)
        assert sorted(registry.renew(map(_of, old), LONG_S)) == sorted(names)
        assert sorted(registry.release(map(_of, old))) == sorted(names)
        new = _eventually(lambda: registry.claim("d", "a", 1500, 10**9, LONG_S))
        while more := registry.claim("d", "a", 1500, 10**9, LONG_S):
            new += more
        assert sorted(claim.id for claim in new) == sorted(names)
        registry.renew_published("p", names, SHORT_S)
        _wait(2 * SHORT_S)
        told: set[str] = set()
        while len(told) < 1500:
            ended = registry.collect("p", 5.0)
            assert ended and {end.kind for end in ended} == {"expired"}
            told |= {end.id for end in ended}
        assert sorted(registry.release(map(_of, new))) == sorted(names)

    def test_what_another_published_is_not_touched(self) -> None:
        """A producer that is wrong about its ids does no harm."""
        registry = self.make()
        registry.publish([_item(0)], LONG_S)
        registry.withdraw("q", ["i0"])
        assert registry.renew_published("q", ["i0"], SHORT_S) == ["i0"]
        assert registry.missing("q", ["i0"]) == ["i0"]
        assert registry.missing("p", ["i0"]) == []
        assert len(registry.claim("c", "a", 1, 10**9, LONG_S)) == 1

    def test_names_that_would_break_records_are_refused(self) -> None:
        """Before anything is offered."""
        registry = self.make()
        good = _item(0)
        for bad in (
            good._replace(id="a\tb"),
            good._replace(id=""),
            good._replace(producer="p\t"),
            good._replace(host=""),
            good._replace(num_bytes=-1),
        ):
            try:
                registry.publish([good, bad], LONG_S)
            except KVUsageError:
                continue
            raise AssertionError(f"{bad} was taken")
        assert registry.depth() == 0
        registry.publish([], LONG_S)
        registry.publish([good._replace(id="ä b:{c}", host="h\n{x}", descriptor=b"\x00\xff")], 9.0)
        (claim,) = registry.claim("c", "h\n{x}", 1, 10**9, LONG_S)
        assert claim.descriptor == b"\x00\xff"
        assert registry.fail([_of(claim)], "tab\there\nand there") == []
        assert [tuple(end) for end in registry.collect("p", 1.0)] == [
            ("ä b:{c}", "failed", "tab\there\nand there")
        ]

    def test_random_calls_are_answered_as_by_the_one_in_memory(self) -> None:
        """Leases last; everything else happens in any order, emptying included."""
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        ours, model = self.make(), MemoryRegistry()
        held: list[tuple[Claim, Claim]] = []
        for turn in range(600):
            kind = rng.choice(["publish", "claim", "claim", "end", "renew", "withdraw", "collect"])
            ids = [f"i{rng.randrange(40)}" for _ in range(rng.randrange(6))]
            if kind == "publish":
                items = [_item(int(i[1:]), rng.choice("abc"), rng.choice("pq")) for i in ids]
                ours.publish(items, LONG_S)
                model.publish(items, LONG_S)
            elif kind == "claim":
                asked = (rng.choice("abz"), rng.randrange(5), rng.randrange(500), LONG_S)
                pair = ours.claim("c", *asked), model.claim("c", *asked)
                assert [c.id for c in pair[0]] == [c.id for c in pair[1]], turn
                held += zip(*pair, strict=True)
            elif kind == "withdraw" and rng.random() < 0.5:
                for registry in (ours, model):
                    registry.withdraw("p", ids)
            elif kind == "withdraw" and rng.random() < 0.1:
                self.empty(ours)
                model.clear()
            elif kind == "collect":
                assert _told(ours) == _told(model), turn
                assert ours.missing("p", ids) == model.missing("p", ids), turn
            else:
                rng.shuffle(held)
                some = held[: rng.randrange(4)]
                answers = [
                    _end_or_renew(registry, kind, turn, [_of(pair[side]) for pair in some])
                    for side, registry in enumerate((ours, model))
                ]
                assert answers[0] == answers[1], turn
            assert ours.depth() == model.depth(), turn

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

    def test_fences_never_come_again(self) -> None:
        """After it was emptied too: an old owner must not end the new owner's claim."""
        registry = self.make()
        registry.publish([_item(0)], LONG_S)
        (old,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        self.empty(registry)
        registry.publish([_item(0)], LONG_S)
        (new,) = registry.claim("d", "a", 1, 10**9, LONG_S)
        assert new.fence > old.fence
        assert registry.renew([_of(old)], LONG_S) == ["i0"]
        assert registry.release([_of(old)]) == ["i0"]
        assert registry.release([_of(new)]) == []

    def test_collect_wakes_at_once(self) -> None:
        """A producer waits without asking again and again; another's news do not wake it."""
        registry = self.make()
        registry.publish([_item(0), _item(1, producer="q")], LONG_S)
        mine, others = registry.claim("c", "a", 2, 10**9, LONG_S)
        first = threading.Timer(0.05, registry.release, ([_of(others)],))
        second = threading.Timer(0.1, registry.release, ([_of(mine)],))
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


def _told(registry: Registry) -> list[tuple[str, ...]]:
    return [tuple(end) for producer in "pq" for end in registry.collect(producer, 0.0)]


def _end_or_renew(
    registry: Registry, kind: str, turn: int, claims: list[tuple[str, int]]
) -> list[str]:
    if kind == "renew":
        return registry.renew(claims, LONG_S)
    return registry.release(claims) if turn % 2 else registry.fail(claims, f"turn {turn}")


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
