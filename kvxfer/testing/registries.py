"""What every registry must do, as tests; the parts may be run alone."""

from __future__ import annotations

from kvxfer.testing.registry_claims import ClaimSuite
from kvxfer.testing.registry_leases import LeaseSuite
from kvxfer.testing.registry_upsets import UpsetSuite


class RegistrySuite(ClaimSuite, LeaseSuite, UpsetSuite):
    """Subclass it; give `make` (an empty registry at each call) and `empty`."""
