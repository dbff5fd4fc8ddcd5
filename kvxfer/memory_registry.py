"""The registry within one process, for tests and for engines that share one."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from kvxfer.registry import Claim, Ended, EndKind, Publication, check


@dataclass(slots=True)
class _Entry:
    item: Publication
    lease_until: float
    fence: int = 0
    claim_until: float | None = None


class MemoryRegistry:
    """`kvxfer.registry.Registry`; `clock` counts seconds, tests bring their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._ended: defaultdict[str, deque[Ended]] = defaultdict(deque)
        self._fence = 0
        self._due = math.inf
        """No lease ends before."""
        self._news = threading.Condition()

    def publish(self, items: Sequence[Publication], lease_s: float) -> None:
        """See `Registry`."""
        check(items)
        with self._news:
            self._expire()
            for item in items:
                entry = self._entries.setdefault(item.id, _Entry(item, 0.0))
                entry.lease_until = self._until(lease_s)

    def claim(
        self, consumer: str, host: str, max_count: int, max_bytes: int, lease_s: float
    ) -> list[Claim]:
        """See `Registry`."""
        with self._news:
            self._expire()
            claims: list[Claim] = []
            for entry in islice(self._ready(host), max(0, max_count)):
                if claims and entry.item.num_bytes > max_bytes:
                    break
                max_bytes -= entry.item.num_bytes
                self._fence += 1
                entry.fence, entry.claim_until = self._fence, self._until(lease_s)
                item = entry.item
                claims.append(Claim(item.id, entry.fence, item.num_bytes, item.descriptor))
            return claims

    def renew(self, claims: Iterable[tuple[str, int]], lease_s: float) -> list[str]:
        """See `Registry`."""
        with self._news:
            self._expire()
            lost = []
            for id_, fence in claims:
                entry = self._owned(id_, fence)
                if entry is None:
                    lost.append(id_)
                else:
                    entry.claim_until = self._until(lease_s)
            return lost

    def release(self, claims: Iterable[tuple[str, int]]) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "released", "")

    def fail(self, claims: Iterable[tuple[str, int]], reason: str) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "failed", reason)

    def collect(self, producer: str, timeout_s: float) -> list[Ended]:
        """See `Registry`."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                self._expire()
                left_s = deadline - time.monotonic()
                if self._ended.get(producer) or left_s <= 0:
                    return list(self._ended.pop(producer, ()))
                self._news.wait(max(0.001, min(left_s, self._due - self._clock())))

    def renew_published(self, producer: str, ids: Iterable[str], lease_s: float) -> list[str]:
        """See `Registry`."""
        with self._news:
            self._expire()
            unknown = []
            for id_ in ids:
                if self._is_of(producer, id_):
                    self._entries[id_].lease_until = self._until(lease_s)
                else:
                    unknown.append(id_)
            return unknown

    def withdraw(self, producer: str, ids: Iterable[str]) -> None:
        """See `Registry`."""
        with self._news:
            for id_ in ids:
                if self._is_of(producer, id_):
                    del self._entries[id_]

    def missing(self, producer: str, ids: Iterable[str]) -> list[str]:
        """See `Registry`."""
        with self._news:
            ended = {end.id for end in self._ended.get(producer, ())}
            return [i for i in ids if not self._is_of(producer, i) and i not in ended]

    def sweep(self) -> int:
        """See `Registry`."""
        with self._news:
            return self._expire()

    def depth(self) -> int:
        """See `Registry`."""
        with self._news:
            return sum(entry.claim_until is None for entry in self._entries.values())

    def clear(self) -> None:
        """Forget everything, as a registry that was emptied."""
        with self._news:
            self._entries.clear()
            self._ended.clear()

    def _ready(self, host: str) -> Iterator[_Entry]:
        """The oldest of the host first, then of others."""
        for own in (True, False):
            for entry in self._entries.values():
                if entry.claim_until is None and (entry.item.host == host) is own:
                    yield entry

    def _until(self, lease_s: float) -> float:
        until = self._clock() + lease_s
        if until < self._due:
            self._due = until
            self._news.notify_all()  # who waits has to wake earlier
        return until

    def _is_of(self, producer: str, id_: str) -> bool:
        entry = self._entries.get(id_)
        return entry is not None and entry.item.producer == producer

    def _owned(self, id_: str, fence: int) -> _Entry | None:
        entry = self._entries.get(id_)
        return entry if entry and entry.claim_until is not None and entry.fence == fence else None

    def _end(self, claims: Iterable[tuple[str, int]], kind: EndKind, reason: str) -> list[str]:
        with self._news:
            self._expire()
            refused = []
            for id_, fence in claims:
                if self._owned(id_, fence) is None:
                    refused.append(id_)
                    continue
                producer = self._entries.pop(id_).item.producer
                self._ended[producer].append(Ended(id_, kind, reason))
            self._news.notify_all()
            return refused

    def _expire(self) -> int:
        now, count = self._clock(), 0
        if now < self._due:
            return 0
        self._due = math.inf
        for id_, entry in list(self._entries.items()):
            if entry.lease_until <= now:
                del self._entries[id_]
                self._ended[entry.item.producer].append(Ended(id_, "expired", "lease expired"))
                count += 1
                continue
            if entry.claim_until is not None and entry.claim_until <= now:
                entry.claim_until = None
                count += 1
            self._due = min(self._due, entry.lease_until, entry.claim_until or math.inf)
        if count:
            self._news.notify_all()
        return count
