"""Leases that end, of claims and of publications, and fences against old owners."""

from __future__ import annotations

from kvxfer.testing.registry_harness import (
    LONG_S,
    SHORT_S,
    RegistryHarness,
    eventually,
    item,
    of,
    wait,
)


class LeaseSuite(RegistryHarness):
    """Times are short; nothing is asserted to be soon."""

    def test_a_claim_that_expired_goes_to_another_and_its_owner_is_refused(self) -> None:
        """Fences: the old owner can neither renew, release nor fail."""
        registry = self.make()
        registry.publish([item(0)], LONG_S)
        (old,) = registry.claim("c", "a", 1, 10**9, SHORT_S)
        new = eventually(lambda: registry.claim("d", "a", 1, 10**9, LONG_S))[0]
        assert new.id == old.id and new.fence > old.fence
        assert registry.renew([of(old)], LONG_S) == ["i0"]
        assert registry.release([of(old)]) == ["i0"]
        assert registry.fail([of(old)], "late") == ["i0"]
        assert registry.renew([of(new)], LONG_S) == []
        assert registry.release([of(new)]) == []

    def test_a_renewed_claim_stays(self) -> None:
        """As long as its owner says so."""
        registry = self.make()
        registry.publish([item(0)], LONG_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, 10 * SHORT_S)
        assert registry.renew([of(claim)], LONG_S) == []
        wait(12 * SHORT_S)
        assert registry.claim("d", "a", 1, 10**9, LONG_S) == []
        assert registry.release([of(claim)]) == []

    def test_a_publication_that_expired_is_told(self) -> None:
        """Ready or claimed: the producer's lease is the outer one."""
        registry = self.make()
        registry.publish([item(0), item(1)], SHORT_S)
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        eventually(lambda: registry.sweep() or registry.depth() == 0)
        ended = eventually(lambda: registry.collect("p", 0.05))
        assert {end.kind for end in ended} == {"expired"}
        assert registry.release([of(claim)]) == ["i0"]

    def test_whoever_waits_is_told_of_what_expires_meanwhile(self) -> None:
        """Nobody else has to call anything."""
        registry = self.make()
        registry.publish([item(0)], SHORT_S)
        assert [(end.id, end.kind) for end in registry.collect("p", 20.0)] == [("i0", "expired")]

    def test_many_that_expire_at_once(self) -> None:
        """More than one sweep takes: all are told in the end, none is claimed or kept late."""
        registry, names = self.make(), [f"i{i}" for i in range(1500)]
        registry.publish([item(i) for i in range(1500)], LONG_S)
        old = registry.claim("c", "a", 1500, 10**9, SHORT_S)
        assert len(old) == 1500
        wait(2 * SHORT_S)
        assert sorted(registry.renew(map(of, old), LONG_S)) == sorted(names)
        assert sorted(registry.release(map(of, old))) == sorted(names)
        new = eventually(lambda: registry.claim("d", "a", 1500, 10**9, LONG_S))
        while more := registry.claim("d", "a", 1500, 10**9, LONG_S):
            new += more
        assert sorted(claim.id for claim in new) == sorted(names)
        registry.renew_published("p", names, SHORT_S)
        wait(2 * SHORT_S)
        told: set[str] = set()
        while len(told) < 1500:
            ended = registry.collect("p", 5.0)
            assert ended and {end.kind for end in ended} == {"expired"}
            told |= {end.id for end in ended}
        assert sorted(registry.release(map(of, new))) == sorted(names)

    def test_renewed_publications_stay_and_unknown_ones_are_named(self) -> None:
        """A producer finds out by its renewal what was forgotten."""
        registry = self.make()
        registry.publish([item(0), item(1)], LONG_S)
        assert registry.renew_published("p", ["i0", "i1", "i9"], LONG_S) == ["i9"]
        assert registry.missing("p", ["i0", "i9"]) == ["i9"]
        (claim,) = registry.claim("c", "a", 1, 10**9, LONG_S)
        registry.release([of(claim)])
        assert registry.missing("p", ["i0", "i1"]) == []  # i0 waits to be collected
        registry.collect("p", 1.0)
        assert registry.missing("p", ["i0", "i1"]) == ["i0"]
