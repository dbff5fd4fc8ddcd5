"""Mooncake's transfer engine: one batch of reads a transfer; over tcp, or what MOONCAKE_PROTOCOL
says, on the device of MOONCAKE_DEVICE."""

from __future__ import annotations

import os
from typing import Any

import ends
from mooncake.engine import TransferEngine

_kept: list[Any] = []
Prepared = tuple[list[int], list[int], list[int]]


def _engine(address: int, num_bytes: int) -> Any:
    engine = TransferEngine()
    protocol = os.environ.get("MOONCAKE_PROTOCOL", "tcp")
    device = os.environ.get("MOONCAKE_DEVICE", "")
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", protocol, device):
        raise RuntimeError("the engine does not start")
    if engine.register_memory(address, num_bytes):
        raise RuntimeError("the pool cannot be registered")
    return engine


def serve(pool_bytes: int) -> dict[str, Any]:
    """The end that has the bytes."""
    memory, address = ends.pool(pool_bytes, ends.FILL)
    engine = _engine(address, pool_bytes)
    _kept.extend([memory, engine])
    return {"session": f"127.0.0.1:{engine.get_rpc_port()}", "address": address}


class Reader:
    """The end that wants them."""

    def __init__(self, pool_bytes: int, remote: dict[str, Any]) -> None:
        self._memory, self.address = ends.pool(pool_bytes, 0)
        self._engine = _engine(self.address, pool_bytes)
        self._session, self._there = remote["session"], remote["address"]

    def prepare(self, pieces: ends.Pieces) -> Prepared:
        """Its arguments."""
        return (
            [self.address + target for _, target, _ in pieces],
            [self._there + source for source, _, _ in pieces],
            [size for _, _, size in pieces],
        )

    def read(self, prepared: Prepared) -> None:
        """Waits within the library."""
        if self._engine.batch_transfer_sync_read(self._session, *prepared):
            raise RuntimeError("the read failed")


if __name__ == "__main__":
    ends.main(serve, Reader)
