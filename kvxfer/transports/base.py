"""The contract of a transport.

Producer's side: `serve(region)` once for each region, at start; it returns an address (JSON-able)
that goes into every descriptor. From then on readers come without further calls. `close` stops
that; it does not close the region.

Consumer's side: `reaches` is asked before each read and must be cheap and offline. `read` copies
what a plan says and *afterwards* fetches epoch and generations; several threads call it at once.
The destination blocks belong to the call until it returns or raises: from then on nothing writes
them any more, on a device or a NIC either. What they hold after it raised is undefined. Every
failure is a `TransportError`, an address that makes no sense a `BadDescriptor`; nothing is retried
here. Descriptors come from elsewhere: a block that the peer's region does not have is an error
like every other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from kvxfer.errors import BadDescriptor
from kvxfer.plan import ReadPlan
from kvxfer.region import Region

Address = Mapping[str, Any]


class Stamp(NamedTuple):
    """What the producer's side said after the last byte was copied."""

    epoch: int
    generations: list[int]
    """Of the plan's `src_blocks`, in that order."""


class Transport(Protocol):
    """One way for KV to move. See the module for who calls what when."""

    name: str

    def serve(self, region: Region) -> Address:
        """Let the region be read; returns the address for descriptors."""

    def reaches(self, address: Address, host: str) -> bool:
        """Whether an address of a producer on `host` can be read from here."""

    def read(
        self,
        address: Address,
        plan: ReadPlan,
        destination: Region,
        timeout_s: float,
    ) -> Stamp:
        """Copy what `plan` says. Raises TransportError and its kinds within about `timeout_s`."""

    def close(self) -> None:
        """Stop serving, let go of what was opened at peers. Idempotent."""


def check_source(plan: ReadPlan, num_blocks: int, block_bytes: int) -> None:
    """The peer's region has what the plan reads. Raises BadDescriptor."""
    if block_bytes != plan.src_block_bytes:
        raise BadDescriptor(f"blocks of {block_bytes} bytes there, not {plan.src_block_bytes}")
    if plan.src_blocks and max(plan.src_blocks) >= num_blocks:
        raise BadDescriptor(f"no block {max(plan.src_blocks)} in that region")


def number(address: Address, name: str) -> int:
    """A whole number of an address. Raises BadDescriptor."""
    value = address.get(name)
    if type(value) is not int or value < 0:
        raise BadDescriptor(f"an address whose {name} is {value!r}")
    return value


def text(address: Address, name: str) -> str:
    """A string of an address. Raises BadDescriptor."""
    value = address.get(name)
    if not isinstance(value, str):
        raise BadDescriptor(f"an address whose {name} is {value!r}")
    return value
