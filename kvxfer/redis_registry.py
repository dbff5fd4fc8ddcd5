"""The registry in Redis (6.2 or newer) or Valkey: Lua scripts, one call for many items.

The caller brings the client (`redis.Redis`, with `decode_responses=False`); nothing here imports
redis. Time is the server's, so hosts need not agree on theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final

from kvxfer import lua
from kvxfer.errors import RegistryUnavailable
from kvxfer.registry import Claim, Ended, Publication, check

_SEP: Final = "\t"
_AT_ONCE: Final = 512
_WAIT_S: Final = 1.0
"""Longest wait in one call to the server; the client's socket time-out must be above it."""
_CLIENTS: Final = ("redis", "valkey")
_BUGS: Final = (
    *("WRONGTYPE", "user_script", "Error running script", "Error compiling script"),
    *("unknown command", "wrong number of arguments", "value is not"),
)


class RedisRegistry:
    """`kvxfer.registry.Registry` under `namespace`. Safe to share among threads."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self._ns = f"{{{namespace}}}"
        self._keys = [f"{self._ns}:{k}" for k in ("d", "m", "lease", "claim", "ready", "seq")]
        self._scripts = {
            name: client.register_script(getattr(lua, name))
            for name in (
                *("PUBLISH", "CLAIM", "RENEW", "END"),
                *("RENEW_PUBLISHED", "WITHDRAW", "MISSING", "SWEEP"),
            )
        }

    def publish(self, items: Sequence[Publication], lease_s: float) -> None:
        """See `Registry`."""
        check(items)
        if items:
            flat = chain.from_iterable(
                (i.id, i.producer, i.host, i.num_bytes, i.descriptor) for i in items
            )
            self._run("PUBLISH", f"own:{items[0].host}", _ms(lease_s), *flat)

    def claim(
        self, consumer: str, host: str, max_count: int, max_bytes: int, lease_s: float
    ) -> list[Claim]:
        """See `Registry`."""
        if max_count < 1:
            return []
        found = self._run("CLAIM", f"own:{host}", _ms(lease_s), max_count, max(0, max_bytes))
        rows = zip(found[::4], found[1::4], found[2::4], found[3::4], strict=True)
        return [Claim(_text(i), int(fence), int(size), desc) for i, fence, size, desc in rows]

    def renew(self, claims: Iterable[tuple[str, int]], lease_s: float) -> list[str]:
        """See `Registry`."""
        flat = list(chain.from_iterable(claims))
        return [_text(i) for i in self._run("RENEW", "seq", _ms(lease_s), *flat)] if flat else []

    def release(self, claims: Iterable[tuple[str, int]]) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "released", "")

    def fail(self, claims: Iterable[tuple[str, int]], reason: str) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "failed", reason)

    def collect(self, producer: str, timeout_s: float) -> list[Ended]:
        """See `Registry`. Waits in Redis, so it wakes at once."""
        key = f"{self._ns}:ended:{producer}"
        deadline = time.monotonic() + timeout_s
        while not (found := self._call(lambda: self._client.lpop(key, _AT_ONCE))):
            self.sweep()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return []
            wait = partial(self._client.blpop, [key], timeout=min(_WAIT_S, max(left_s, 0.01)))
            if first := self._call(wait):
                found = [first[1], *self._more(key)]
                break
        parts = (_text(entry).split(_SEP, 2) for entry in found)
        return [Ended(id_, kind, reason) for id_, kind, reason in parts]  # type: ignore[arg-type]

    def renew_published(self, producer: str, ids: Iterable[str], lease_s: float) -> list[str]:
        """See `Registry`."""
        wanted = list(ids)
        if not wanted:
            return []
        unknown = self._run("RENEW_PUBLISHED", f"ended:{producer}", _ms(lease_s), producer, *wanted)
        return [_text(i) for i in unknown]

    def withdraw(self, producer: str, ids: Iterable[str]) -> None:
        """See `Registry`."""
        if wanted := list(ids):
            self._run("WITHDRAW", f"ended:{producer}", producer, *wanted)

    def missing(self, producer: str, ids: Iterable[str]) -> list[str]:
        """See `Registry`."""
        wanted = list(ids)
        if not wanted:
            return []
        return [_text(i) for i in self._run("MISSING", f"ended:{producer}", producer, *wanted)]

    def sweep(self) -> int:
        """See `Registry`."""
        return int(self._run("SWEEP", "seq"))

    def depth(self) -> int:
        """See `Registry`."""
        return int(self._call(lambda: self._client.zcard(self._keys[4])))

    def _end(self, claims: Iterable[tuple[str, int]], kind: str, reason: str) -> list[str]:
        flat = list(chain.from_iterable(claims))
        return [_text(i) for i in self._run("END", "seq", kind, reason, *flat)] if flat else []

    def _run(self, name: str, last_key: str, *args: Any) -> Any:
        keys = [*self._keys, f"{self._ns}:{last_key}"]
        return self._call(lambda: self._scripts[name](keys=keys, args=args))

    def _more(self, key: str) -> list[bytes]:
        """What else lies in the list; the first is taken already, so a failure must not lose it."""
        try:
            return self._call(lambda: self._client.lpop(key, _AT_ONCE)) or []
        except RegistryUnavailable:
            return []

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as error:
            raise RegistryUnavailable(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in _CLIENTS or _is_bug(error):
                raise
            raise RegistryUnavailable(f"{type(error).__name__}: {error}") from error


def _is_bug(error: Exception) -> bool:
    """Whether trying again is of no use: the server refuses the command itself, or the client
    refuses its arguments."""
    if type(error).__name__ == "DataError":
        return True
    return type(error).__name__ == "ResponseError" and str(error).startswith(_BUGS)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
