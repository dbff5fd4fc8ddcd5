"""NIXL with its UCX backend, as engines use it: lists of pieces are prepared, a transfer is one
request made of them, posted and polled. UCX_TLS says which links UCX may take.

The reader has no progress thread: it polls all the time, and on two processors another thread that
polls makes it five times slower. The source needs one.
"""

from __future__ import annotations

import base64
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import ends

_package = next(name for name in ("nixl", "nixl_cu13", "nixl_cu12") if find_spec(name))
_api: Any = import_module(f"{_package}._api")
_kept: list[Any] = []
Prepared = tuple[Any, Any, list[int]]


def _agent(name: str, address: int, num_bytes: int) -> Any:
    settings = _api.nixl_agent_config(enable_prog_thread=name == "source", backends=["UCX"])
    agent = _api.nixl_agent(name, settings)
    agent.register_memory([(address, num_bytes, 0, "")], "DRAM")
    return agent


def serve(pool_bytes: int) -> dict[str, Any]:
    """The end that has the bytes."""
    memory, address = ends.pool(pool_bytes, ends.FILL)
    agent = _agent("source", address, pool_bytes)
    _kept.extend([memory, agent])
    known = base64.b64encode(agent.get_agent_metadata()).decode()
    return {"metadata": known, "address": address}


class Reader:
    """The end that wants them."""

    def __init__(self, pool_bytes: int, remote: dict[str, Any]) -> None:
        self._memory, self.address = ends.pool(pool_bytes, 0)
        self._agent = _agent("reader", self.address, pool_bytes)
        self._there = remote["address"]
        name = self._agent.add_remote_agent(base64.b64decode(remote["metadata"]))
        self._name = name.decode() if isinstance(name, bytes) else name

    def prepare(self, pieces: ends.Pieces) -> Prepared:
        """Lists of pieces at both ends."""
        here = [(self.address + target, size, 0) for _, target, size in pieces]
        there = [(self._there + source, size, 0) for source, _, size in pieces]
        return (
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", here, "DRAM"),
            self._agent.prep_xfer_dlist(self._name, there, "DRAM"),
            list(range(len(pieces))),
        )

    def read(self, prepared: Prepared) -> None:
        """Polls, as one does."""
        here, there, which = prepared
        handle = self._agent.make_prepped_xfer("READ", here, which, there, which)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"the read ended in {state}")
        self._agent.release_xfer_handle(handle)


if __name__ == "__main__":
    ends.main(serve, Reader)
