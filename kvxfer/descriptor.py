"""What a reader must know of pinned KV: where it lies, how to get it, how to prove it."""

from __future__ import annotations

import array
import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvxfer.errors import BadDescriptor, TokenMismatch


def token_hash(token_ids: Sequence[int]) -> str:
    """64 hex digits: SHA-256 over the ids as little-endian unsigned 32-bit numbers."""
    packed = array.array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class KVDescriptor:
    """Pinned KV of one prompt. Plain data: JSON, no code, no pointer that means anything here."""

    id: str
    producer: str
    """The worker's life that holds it."""
    host: str
    epoch: int
    layout: str
    """`KVLayout.fingerprint`"""
    block_ids: tuple[int, ...]
    """In the producer's region, in the order of the tokens."""
    generations: tuple[int, ...]
    """Of those blocks when they were pinned."""
    num_tokens: int
    """Tokens whose KV is in the blocks; the last block may be partly filled."""
    token_hash: str
    num_bytes: int
    endpoints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Address by transport's name."""
    payload: bytes = b""
    """The publisher's own; kvxfer does not look into it."""
    created_at: float = 0.0
    """Seconds since the epoch by the producer's clock."""

    def to_json(self) -> bytes:
        """One line of JSON."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "payload"}
        values["payload"] = base64.b64encode(self.payload).decode("ascii")
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> KVDescriptor:
        """The inverse. Raises BadDescriptor that names what is wrong."""
        try:
            values = json.loads(text)
            values["block_ids"] = _numbers(values, "block_ids")
            values["generations"] = _numbers(values, "generations")
            values["payload"] = base64.b64decode(values["payload"], validate=True)
            found = cls(**values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadDescriptor(f"not a KV descriptor: {error}") from error
        found._check()
        return found

    def _check(self) -> None:
        """What came from elsewhere has the types that are written here. Raises BadDescriptor."""
        for name in ("id", "producer", "host", "layout", "token_hash"):
            if not isinstance(getattr(self, name), str):
                raise BadDescriptor(f"{name} is {getattr(self, name)!r}, not a string")
        for name in ("epoch", "num_tokens", "num_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise BadDescriptor(f"{name} is {value!r}, not a number from 0 on")
        if not isinstance(self.endpoints, dict) or not all(
            isinstance(address, dict) for address in self.endpoints.values()
        ):
            raise BadDescriptor("endpoints are not addresses by transport")
        if len(self.block_ids) != len(self.generations):
            raise BadDescriptor(
                f"{len(self.block_ids)} blocks but {len(self.generations)} generations"
            )

    def prove_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises TokenMismatch unless the KV was computed from exactly these tokens."""
        if token_hash(token_ids) != self.token_hash:
            raise TokenMismatch(f"the KV of {self.id} belongs to other tokens")


def _numbers(values: dict[str, Any], name: str) -> tuple[int, ...]:
    """A list of whole numbers from 0 on, none above 64 bits."""
    found = tuple(values[name])
    if any(type(number) is not int for number in found):
        raise ValueError(f"{name} holds something else than whole numbers")
    if found and not 0 <= min(found) <= max(found) < 1 << 64:
        raise ValueError(f"{name} holds {min(found)} to {max(found)}")
    return found
