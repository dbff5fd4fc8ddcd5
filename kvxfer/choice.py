"""Which transports an end opens, which one two ends take, and why not the others.

`auto` is all that can be used here, in the order of AUTO: on one device or between peers of one
machine (cuda_ipc), through shared memory, by RDMA, by TCP. A list is kept as given; a name in it
that cannot be used is an error, since somebody asked for it. What can be used here is
`kvxfer.offers`' to say; `kvxfer.opening` makes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvxfer.errors import UnknownTransport, UnusableTransport
from kvxfer.offers import Offer

AUTO: Final = ("cuda_ipc", "shm", "rdma", "tcp")
"""From fast to slow; what `auto` tries."""
NAMES: Final = (*AUTO, "mem")
LOOPBACK: Final = ("127.", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What decides, of one end."""

    host: str
    device: str
    """Where its engine computes: `cpu`, `cuda:0`."""
    transports: tuple[str, ...]
    """Those that it opened, best first."""
    gpu: str = ""
    """Which GPU that is (its UUID), where known: numbers are each process's own."""
    listen_host: str = ""
    """Where it listens; "" unknown."""


class Verdict(NamedTuple):
    """How KV would move; `transport` is "" where it cannot."""

    transport: str
    why: str
    passed_over: tuple[tuple[str, str], ...]
    """The better ones that were not taken, each with the reason."""


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, `auto` alone or not at all. Raises UnknownTransport."""
    for name in names:
        if name in NAMES or (name == "auto" and len(names) == 1):
            continue
        if name == "auto":
            raise UnknownTransport("`auto` stands alone, not in a list", remedy="Name them all.")
        near = difflib.get_close_matches(name, NAMES, n=1)
        remedy = f"Did you mean {near[0]}? " if near else ""
        raise UnknownTransport(
            f"there is no transport {name!r}", remedy=f"{remedy}There are {', '.join(AUTO)}."
        )
    if not names:
        raise UnknownTransport("no transport is named", remedy=f"Name some of {', '.join(AUTO)}.")
    return tuple(dict.fromkeys(names))


def select(names: Sequence[str], offers: Sequence[Offer]) -> tuple[list[str], list[Offer]]:
    """The transports to open, best first, and the offers that `auto` left out.

    Raises UnknownTransport, and UnusableTransport for one that was named and cannot be used.
    """
    wanted = check_names(names)
    by_name = {offer.name: offer for offer in offers}
    if wanted == ("auto",):
        taken = [offer.name for offer in offers if offer.usable]
        return taken, [offer for offer in offers if not offer.usable]
    for name in wanted:
        offer = by_name.get(name)
        if offer is not None and not offer.usable:
            raise UnusableTransport(
                f"{name} cannot be used here: {offer.why}",
                remedy=offer.remedy or f"Leave {name} out of the list, or say `auto`.",
            )
    return list(wanted), []


def meet(
    source: End, reader: End, *, gpu_link: str = "", closed: Mapping[str, str] | None = None
) -> Verdict:
    """What `reader` would take to pull from `source`: its first transport that reaches.

    For the reasons: `gpu_link` says how their GPUs reach each other, `closed` why the reader has
    not opened a transport.
    """
    passed: list[tuple[str, str]] = []
    same_host = source.host == reader.host
    for name in sorted(set(AUTO) - set(reader.transports), key=AUTO.index):
        unknown = f"{reader.host}'s {reader.device} has not opened it"
        passed.append((name, (closed or {}).get(name, unknown)))
    for name in reader.transports:
        problem = _problem(name, source, reader)
        if problem:
            passed.append((name, problem))
            continue
        why = _reason(name, source, reader, gpu_link) if same_host else "two machines"
        better = [entry for entry in passed if _before(entry[0], name, reader.transports)]
        return Verdict(name, why, tuple(better))
    return Verdict("", "no transport reaches from one to the other", tuple(passed))


def _problem(name: str, source: End, reader: End) -> str:
    """Why this transport does not reach; "" where it does."""
    if name not in source.transports:
        return f"{source.host}'s {source.device} does not offer it"
    if name in ("cuda_ipc", "shm", "mem") and source.host != reader.host:
        return "works within one machine"
    if source.host != reader.host and source.listen_host.startswith(LOOPBACK):
        return f"{source.host} listens on {source.listen_host}, which no other machine reaches"
    return ""


def _reason(name: str, source: End, reader: End, gpu_link: str) -> str:
    if name != "cuda_ipc":
        return "one machine"
    one = (source.gpu or source.device) == (reader.gpu or reader.device)
    return "one device" if one else gpu_link or "two devices of one machine"


def _before(name: str, taken: str, order: Sequence[str]) -> bool:
    """Whether `name` would have been better than the one that was taken."""
    ranks = list(order) if name in order else list(AUTO)
    return taken not in ranks or ranks.index(name) < ranks.index(taken)
