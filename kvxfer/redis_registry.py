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
_KEYS: Final = ("d", "m", "lease", "claim", "ready", "seq", "own", "gone")
_SCRIPTS: Final = (
    *("PUBLISH", "CLAIM", "RENEW", "END", "COLLECT"),
    *("RENEW_PUBLISHED", "WITHDRAW", "MISSING", "SWEEP"),
)
_AT_ONCE: Final = 512
_MOST_REMEMBERED: Final = 100_000
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
        self._keys = [f"{self._ns}:{key}" for key in _KEYS]
        self._scripts = {name: client.register_script(getattr(lua, name)) for name in _SCRIPTS}
        self._producers: dict[str, str] = {}  # of what was claimed here: whose list to wake

    def publish(self, items: Sequence[Publication], lease_s: float) -> None:
        """See `Registry`."""
        check(items)
        if items:
            flat = chain.from_iterable(
                (i.id, i.producer, i.host, i.num_bytes, i.descriptor) for i in items
            )
            self._run("PUBLISH", (), _ms(lease_s), *flat)

    def claim(
        self, consumer: str, host: str, max_count: int, max_bytes: int, lease_s: float
    ) -> list[Claim]:
        """See `Registry`."""
        if max_count < 1:
            return []
        found = self._run("CLAIM", (), _ms(lease_s), max_count, max(0, max_bytes), host)
        if len(self._producers) > _MOST_REMEMBERED:
            self._producers.clear()  # of claims that nobody ended; the rest is told by `gone`
        rows = zip(*(found[i::5] for i in range(5)), strict=True)
        claims = []
        for id_, fence, size, descriptor, producer in rows:
            claims.append(Claim(_text(id_), int(fence), int(size), descriptor))
            self._producers[_text(id_)] = _text(producer)
        return claims

    def renew(self, claims: Iterable[tuple[str, int]], lease_s: float) -> list[str]:
        """See `Registry`."""
        flat = list(chain.from_iterable(claims))
        return [_text(i) for i in self._run("RENEW", (), _ms(lease_s), *flat)] if flat else []

    def release(self, claims: Iterable[tuple[str, int]]) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "released", "")

    def fail(self, claims: Iterable[tuple[str, int]], reason: str) -> list[str]:
        """See `Registry`."""
        return self._end(claims, "failed", reason)

    def collect(self, producer: str, timeout_s: float) -> list[Ended]:
        """See `Registry`. Waits in Redis: a release wakes it at once, an expiry in a second."""
        key = f"{self._ns}:ended:{producer}"
        deadline = time.monotonic() + timeout_s
        while not (found := self._run("COLLECT", (producer,), producer, _AT_ONCE)):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return []
            wait = partial(self._client.blpop, [key], timeout=min(_WAIT_S, max(left_s, 0.01)))
            if first := self._call(wait):
                found = [first[1], *self._more(producer)]
                break
        parts = (_text(entry).split(_SEP, 2) for entry in found)
        return [Ended(id_, kind, reason) for id_, kind, reason in parts]  # type: ignore[arg-type]

    def renew_published(self, producer: str, ids: Iterable[str], lease_s: float) -> list[str]:
        """See `Registry`."""
        wanted = list(ids)
        if not wanted:
            return []
        unknown = self._run("RENEW_PUBLISHED", (), _ms(lease_s), producer, *wanted)
        return [_text(i) for i in unknown]

    def withdraw(self, producer: str, ids: Iterable[str]) -> None:
        """See `Registry`."""
        if wanted := list(ids):
            self._run("WITHDRAW", (), producer, *wanted)

    def missing(self, producer: str, ids: Iterable[str]) -> list[str]:
        """See `Registry`."""
        wanted = list(ids)
        if not wanted:
            return []
        return [_text(i) for i in self._run("MISSING", (producer,), producer, *wanted)]

    def sweep(self) -> int:
        """See `Registry`."""
        return int(self._run("SWEEP", ()))

    def depth(self) -> int:
        """See `Registry`."""
        return int(self._call(lambda: self._client.zcard(self._keys[4])))

    def _end(self, claims: Iterable[tuple[str, int]], kind: str, reason: str) -> list[str]:
        wanted = list(claims)
        if not wanted:
            return []
        known = (self._producers.get(id_) for id_, _ in wanted)
        producers = dict.fromkeys(name for name in known if name is not None)
        flat = chain.from_iterable(wanted)
        refused = [_text(i) for i in self._run("END", producers, kind, reason, *flat)]
        for id_ in {id_ for id_, _ in wanted}.difference(refused):
            self._producers.pop(id_, None)  # not of the refused: a later claim of ours may be good
        return refused

    def _run(self, name: str, producers: Iterable[str], *args: Any) -> Any:
        """`producers`: those whose lists the script may touch."""
        keys = [*self._keys, *(f"{self._ns}:ended:{producer}" for producer in producers)]
        return self._call(lambda: self._evaluate(name, keys, args))

    def _evaluate(self, name: str, keys: list[str], args: Any) -> Any:
        try:
            return self._scripts[name](keys=keys, args=args)
        except Exception as error:
            if type(error).__name__ != "NoScriptError":
                raise
        # Forgotten again between the client's loading and its calling.
        return self._client.eval(getattr(lua, name), len(keys), *keys, *args)

    def _more(self, producer: str) -> list[bytes]:
        """What else there is; the first is taken already, so a failure must not lose it."""
        try:
            return list(self._run("COLLECT", (producer,), producer, _AT_ONCE))
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
