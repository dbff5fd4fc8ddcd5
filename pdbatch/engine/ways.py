"""Which ways KV takes: the configured transports, chosen by what this machine and pool can use.

Beside `pdbatch.engine.handoff` alone in importing kvxfer.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from kvxfer import CudaIpcTransport, Region, Transport, whole_blocks
from kvxfer.choice import select
from kvxfer.errors import KVTransferError, UnknownTransport, UnusableTransport
from kvxfer.offers import available
from kvxfer.opening import open_transport
from pdbatch.engine.config import EngineConfig
from pdbatch.errors import ConfigError

logger = logging.getLogger(__name__)

_REHEARSAL_S = 60.0
_PULLS_BYTES_PER_S = 180e9
"""Of a peer's GPU memory, on average: a decode step beside pulls without a pause is then slowed by
4% (5.5% without a limit: benchmarks/NOTES.md). A prefill makes KV at a tenth of that or less."""


def resolve(names: Sequence[str], device: str = "cpu") -> list[str]:
    """The transports to open for a pool on `device`, best first; `auto` is all that can be used.

    Raises ConfigError for a name that is unknown, or that was given and cannot be used here.
    """
    try:
        taken, left = select(names, available(device))
    except (UnknownTransport, UnusableTransport) as error:
        raise ConfigError(f"kv_transport: {error}", remedy=error.remedy) from error
    for offer in left:
        logger.info("KV does not move by %s: %s", offer.name, offer.why)
    return taken


def transports(config: EngineConfig, device: str = "cpu") -> list[Transport]:
    """The ways of an engine whose pool is on `device`, open, best first.

    One that cannot be opened is left out with a warning where it was not asked for by name.
    Raises ConfigError.
    """
    opened: list[Transport] = []
    for name in resolve(config.kv_transport, device):
        try:
            made = open_transport(
                name,
                host=config.host,
                secret=config.secret,
                listen_host=config.listen_host,
                device=device,
            )
        except (KVTransferError, OSError) as error:
            if tuple(config.kv_transport) != ("auto",):
                for way in opened:
                    way.close()
                raise ConfigError(
                    f"kv_transport: {name} cannot be opened: {error}",
                    remedy="`pdbatch doctor` says what it lacks; `auto` does without it.",
                ) from error
            logger.warning("KV does not move by %s: it cannot be opened: %s", name, error)
        else:
            if isinstance(made, CudaIpcTransport):
                made.pace.bytes_per_s = _PULLS_BYTES_PER_S
            opened.append(made)
    logger.info("KV moves by %s", ", ".join(way.name for way in opened))
    return opened


def serving(ways: list[Transport], endpoints: Collection[str]) -> list[Transport]:
    """The ways that serve; the others are closed."""
    for way in ways:
        if way.name not in endpoints:
            way.close()
    return [way for way in ways if way.name in endpoints]


def rehearsed(ways: list[Transport], config: EngineConfig, region: Region) -> list[Transport]:
    """The ways, after those that compile a kernel have read a block of this pool as if it were a
    peer's: the first pull then takes no longer than the next. One that fails is left out with a
    warning where others remain.

    Call before any block is used: block 1 is overwritten.
    """
    if region.num_blocks < 2 or not region.device.startswith("cuda"):
        return ways
    kept = []
    for way in ways:
        problem = _rehearse(config, region) if way.name == "cuda_ipc" else None
        if problem is not None:
            logger.warning("KV cannot be read by %s: %s", way.name, problem, exc_info=problem)
        if problem is None or len(ways) == 1:
            kept.append(way)
        else:
            way.close()
    return kept


def _rehearse(config: EngineConfig, region: Region) -> Exception | None:
    """Over a transport of its own, so that the pool is not served afterwards."""
    own = open_transport(
        "cuda_ipc", host=config.host, secret=config.secret, listen_host=config.listen_host
    )
    try:
        plan = whole_blocks((0,), (1,), region.block_bytes)
        own.read(own.serve(region), plan, region, _REHEARSAL_S)
    except Exception as error:  # a compiler that is missing is no error of kvxfer's
        return error
    finally:
        own.close()
    return None
