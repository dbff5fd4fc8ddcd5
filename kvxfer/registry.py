"""Who offers which KV, and who has claimed it: the contract (one in memory, one in Redis).

A life of one publication:

    publish ─► ready ─claim─► claimed ─release─► ended (released)
                 ▲               │─fail────────► ended (failed)
                 └──── the claim's lease expires
    ready or claimed ─ the publication's lease expires ─► ended (expired)

Ended ones lie in a list for their producer until it collects them. A claim carries a fence: after
its lease expired, or another claimed, release, fail and renew of the old owner are refused.
A registry may be emptied at any moment: unknown ids are refused or `missing`, never an error.
Every method may raise RegistryUnavailable; calling again is safe: if only the answer was lost,
claims run out, a release is refused the second time, and news that `collect` lost shows as
`missing`. An id is published by one producer; the calls of another do not touch it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from kvxfer.errors import KVUsageError

EndKind = Literal["released", "failed", "expired"]


class Publication(NamedTuple):
    """What the registry must know of one descriptor."""

    id: str
    producer: str
    host: str
    num_bytes: int
    descriptor: bytes
    """Opaque here."""


class Claim(NamedTuple):
    """An exclusive right that expires."""

    id: str
    fence: int
    num_bytes: int
    descriptor: bytes


class Ended(NamedTuple):
    """News for a producer: these blocks may be unpinned, or must be thought over."""

    id: str
    kind: EndKind
    reason: str


class Registry(Protocol):
    """See the module. All durations are seconds."""

    def publish(self, items: Sequence[Publication], lease_s: float) -> None:
        """Offer these; one that is there already stays as it is (its lease is renewed).

        Raises KVUsageError for names that `check` refuses."""

    def claim(
        self, consumer: str, host: str, max_count: int, max_bytes: int, lease_s: float
    ) -> list[Claim]:
        """The oldest of the own host first, then of others, within the budget of bytes.

        The first is given even if it alone is above the budget."""

    def renew(self, claims: Iterable[tuple[str, int]], lease_s: float) -> list[str]:
        """Keep (id, fence) claims alive; returns the ids that are lost."""

    def release(self, claims: Iterable[tuple[str, int]]) -> list[str]:
        """The KV is here and proved: the producer may unpin. Returns the ids refused."""

    def fail(self, claims: Iterable[tuple[str, int]], reason: str) -> list[str]:
        """The KV could not be had: the producer must think again. Returns the ids refused."""

    def collect(self, producer: str, timeout_s: float) -> list[Ended]:
        """What ended; waits up to `timeout_s` for the first. Given at most once."""

    def renew_published(self, producer: str, ids: Iterable[str], lease_s: float) -> list[str]:
        """Keep publications alive; returns the ids that the registry does not know."""

    def withdraw(self, producer: str, ids: Iterable[str]) -> None:
        """Forget these; claims on them are lost."""

    def missing(self, producer: str, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that are neither published nor in the ended list."""

    def sweep(self) -> int:
        """Expire what is due; returns how many. Anybody may call it; claim does so too."""

    def depth(self) -> int:
        """How many are ready, with those whose lease ended since the last sweep."""


def check(items: Sequence[Publication]) -> None:
    """Raises KVUsageError unless ids, producers and hosts are non-empty and free of tabs (which
    part the fields of a registry's records), and sizes are whole numbers from 0 on."""
    for item in items:
        for name in (item.id, item.producer, item.host):
            if not name or "\t" in name:
                raise KVUsageError(f"{name!r} is no name for a registry")
        if type(item.num_bytes) is not int or not 0 <= item.num_bytes < 1 << 53:
            raise KVUsageError(f"{item.id} has {item.num_bytes!r} bytes")
