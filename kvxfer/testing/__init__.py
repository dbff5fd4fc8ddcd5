"""Suites that every transport and every registry must pass; shipped, for those who write another.

    from kvxfer.testing import TransportSuite

    class TestMine(TransportSuite):
        def make(self):
            return MyTransport(...)

Run it with pytest; nothing else is needed. `harness` says what a transport of other memory or of
other machines gives besides. A suite prints the seed of its random tables.
"""

from __future__ import annotations

from kvxfer.testing.registries import RegistrySuite
from kvxfer.testing.transports import TransportSuite

__all__ = ["RegistrySuite", "TransportSuite"]
