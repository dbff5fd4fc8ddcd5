"""Registries that are emptied, called wrongly, called in any order."""

from __future__ import annotations

import random

from kvxfer.errors import KVUsageError
from kvxfer.memory_registry import MemoryRegistry
from kvxfer.registry import Claim, Registry
from kvxfer.testing.registry_harness import LONG_S, RegistryHarness, item, of


class UpsetSuite(RegistryHarness):
    """The registry in memory is the measure of the random calls."""

    def test_names_that_would_break_records_are_refused(self) -> None:
        """Before anything is offered."""
        registry = self.make()
        good = item(0)
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
        assert registry.fail([of(claim)], "tab\there\nand there") == []
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
                items = [item(int(i[1:]), rng.choice("abc"), rng.choice("pq")) for i in ids]
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
                    _end_or_renew(registry, kind, turn, [of(pair[side]) for pair in some])
                    for side, registry in enumerate((ours, model))
                ]
                assert answers[0] == answers[1], turn
            assert ours.depth() == model.depth(), turn

    def test_emptied_at_any_moment(self) -> None:
        """What was there is refused or missing, what comes is taken."""
        registry = self.make()
        registry.publish([item(0), item(1)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        self.empty(registry)
        assert registry.renew([of(claim)], LONG_S) == ["i0"]
        assert registry.release([of(claim)]) == ["i0"]
        assert registry.missing("p", ["i0", "i1"]) == ["i0", "i1"]
        registry.publish([item(0)], LONG_S)
        (again,) = registry.claim("c", "a", 9, 10**9, LONG_S)
        assert registry.release([of(again)]) == []

    def test_fences_never_come_again(self) -> None:
        """After it was emptied too: an old owner must not end the new owner's claim."""
        registry = self.make()
        registry.publish([item(0)], LONG_S)
        (old,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        self.empty(registry)
        registry.publish([item(0)], LONG_S)
        (new,) = registry.claim("d", "a", 1, 10**9, LONG_S)
        assert new.fence > old.fence
        assert registry.renew([of(old)], LONG_S) == ["i0"]
        assert registry.release([of(old)]) == ["i0"]
        assert registry.release([of(new)]) == []


def _told(registry: Registry) -> list[tuple[str, ...]]:
    return [tuple(end) for producer in "pq" for end in registry.collect(producer, 0.0)]


def _end_or_renew(
    registry: Registry, kind: str, turn: int, claims: list[tuple[str, int]]
) -> list[str]:
    if kind == "renew":
        return registry.renew(claims, LONG_S)
    return registry.release(claims) if turn % 2 else registry.fail(claims, f"turn {turn}")
