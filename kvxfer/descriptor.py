"""What a reader must know of pinned KV: where it lies, how to get it, how to prove it.

A descriptor has one part for each rank of the producer, in the order of the ranks. A rank pins its
own blocks and makes a descriptor of one part (`KVProducer.pin`); `merge_parts` joins those of all.
"""

from __future__ import annotations

import array
import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvxfer.errors import BadDescriptor, KVUsageError, TokenMismatch

VERSION = 2
"""Of the text; another one is refused."""


def token_hash(token_ids: Sequence[int]) -> str:
    """64 hex digits: SHA-256 over the ids as little-endian unsigned 32-bit numbers."""
    return hashlib.sha256(_packed(token_ids)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPart:
    """What one rank holds."""

    rank: int = 0
    epoch: int
    block_ids: tuple[int, ...]
    """In the rank's region, in the order of the tokens."""
    generations: tuple[int, ...]
    """Of those blocks when they were pinned."""
    endpoints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Address by transport's name."""
    checksums: tuple[int, ...] = ()
    """Of each block, each head of the rank (`kvxfer.checksum`), block by block; or none at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVDescriptor:
    """Pinned KV of one prompt. Plain data: JSON, no code, no pointer that means anything here."""

    id: str
    producer: str
    """The worker's life that holds it."""
    host: str
    layout: str
    """`KVLayout.fingerprint`"""
    block_size: int
    """Tokens of a block of the producer's."""
    tp_size: int = 1
    """Ranks among which the producer's heads are shared."""
    parts: tuple[KVPart, ...]
    """Of all ranks, in their order; of one until they are merged."""
    num_tokens: int
    """Tokens whose KV is in the blocks; the last block may be partly filled."""
    token_hash: str
    num_bytes: int
    """Of the blocks of all parts."""
    payload: bytes = b""
    """The publisher's own; kvxfer does not look into it."""
    created_at: float = 0.0
    """Seconds since the epoch by the producer's clock."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the producer's, on each rank."""
        return -(-self.num_tokens // self.block_size)

    def to_json(self) -> bytes:
        """One line of JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["payload"] = base64.b64encode(self.payload).decode("ascii")
        values["parts"] = [_part_values(part) for part in self.parts]
        return json.dumps({"version": VERSION, **values}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> KVDescriptor:
        """The inverse. Raises BadDescriptor that names what is wrong."""
        try:
            values = json.loads(text)
            version = values.pop("version", 1)
            if version != VERSION:
                raise BadDescriptor(
                    f"a descriptor of version {version!r}, this kvxfer reads {VERSION}: "
                    "both ends must run the same one"
                )
            values["parts"] = tuple(_part(part) for part in values["parts"])
            values["payload"] = base64.b64decode(values["payload"], validate=True)
            found = cls(**values)
        except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadDescriptor(f"not a KV descriptor: {error}") from error
        found._check()
        return found

    def _check(self) -> None:
        """What came from elsewhere has the types that are written here. Raises BadDescriptor."""
        for name in ("id", "producer", "host", "layout", "token_hash"):
            if not isinstance(getattr(self, name), str):
                raise BadDescriptor(f"{name} is {getattr(self, name)!r}, not a string")
        for name, least in (("block_size", 1), ("tp_size", 1), ("num_tokens", 0), ("num_bytes", 0)):
            _check_number(name, getattr(self, name), least)
        ranks = [part.rank for part in self.parts]
        for rank in ranks:
            _check_number("rank", rank, 0)
        if not ranks or ranks != sorted(set(ranks)) or ranks[-1] >= self.tp_size:
            raise BadDescriptor(f"parts of ranks {ranks} among {self.tp_size}")
        for part in self.parts:
            _check_part(part, self.num_blocks)

    def prove_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises TokenMismatch unless the KV was computed from exactly these tokens."""
        if token_hash(token_ids) != self.token_hash:
            raise TokenMismatch(f"the KV of {self.id} belongs to other tokens")


def merge_parts(descriptors: Sequence[KVDescriptor]) -> KVDescriptor:
    """One descriptor of the parts that all ranks of a producer made of one prompt.

    Id, producer's name, payload and time are those of rank 0. Raises KVUsageError unless all ranks
    are there, once each, on one host, and have pinned the same tokens in blocks of one size.
    """
    parts = sorted((part for found in descriptors for part in found.parts), key=lambda p: p.rank)
    ranks = [part.rank for part in parts]
    if not parts or ranks != list(range(descriptors[0].tp_size)):
        raise KVUsageError(f"ranks {ranks} are not all of a producer's, once each")
    for name in ("host", "layout", "block_size", "tp_size", "num_tokens", "token_hash"):
        if len(values := {getattr(found, name) for found in descriptors}) > 1:
            raise KVUsageError(f"the ranks differ in {name}: {sorted(values)}")
    first = next(found for found in descriptors if found.parts[0].rank == 0)
    return replace(first, parts=tuple(parts), num_bytes=sum(d.num_bytes for d in descriptors))


def _packed(numbers: Sequence[int]) -> bytes:
    """As little-endian unsigned 32-bit numbers."""
    packed = array.array("I", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpacked(data: bytes) -> tuple[int, ...]:
    found = array.array("I", data)
    if sys.byteorder == "big":
        found.byteswap()
    return tuple(found)


def _part_values(part: KVPart) -> dict[str, Any]:
    values = {name: getattr(part, name) for name in part.__slots__}
    values["checksums"] = base64.b64encode(_packed(part.checksums)).decode("ascii")
    return values


def _part(values: dict[str, Any]) -> KVPart:
    checksums = _unpacked(base64.b64decode(values["checksums"], validate=True))
    lists = {name: _numbers(values, name) for name in ("block_ids", "generations")}
    return KVPart(**{**values, **lists, "checksums": checksums})


def _check_part(part: KVPart, num_blocks: int) -> None:
    _check_number("epoch", part.epoch, 0)
    if not isinstance(part.endpoints, dict) or not all(
        isinstance(address, dict) for address in part.endpoints.values()
    ):
        raise BadDescriptor("endpoints are not addresses by transport")
    if not len(part.block_ids) == len(part.generations) == num_blocks:
        raise BadDescriptor(
            f"{len(part.block_ids)} blocks and {len(part.generations)} generations where the "
            f"tokens fill {num_blocks}"
        )


def _check_number(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise BadDescriptor(f"{name} is {value!r}, not a number from {least} on")


def _numbers(values: dict[str, Any], name: str) -> tuple[int, ...]:
    """A list of whole numbers from 0 on, none above 64 bits."""
    found = tuple(values[name])
    if any(type(number) is not int for number in found):
        raise ValueError(f"{name} holds something else than whole numbers")
    if found and not 0 <= min(found) <= max(found) < 1 << 64:
        raise ValueError(f"{name} holds {min(found)} to {max(found)}")
    return found
