"""Which ways KV takes: the configured transports, chosen by what this machine and pool can use.

Beside `pdbatch.engine.handoff` alone in importing kvxfer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvxfer import Transport
from kvxfer.choice import available, open_transport, select
from kvxfer.errors import KVTransferError, UnknownTransport, UnusableTransport
from pdbatch.engine.config import EngineConfig
from pdbatch.errors import ConfigError

logger = logging.getLogger(__name__)


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
                name, host=config.host, secret=config.secret, listen_host=config.listen_host
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
            opened.append(made)
    logger.info("KV moves by %s", ", ".join(way.name for way in opened))
    return opened
