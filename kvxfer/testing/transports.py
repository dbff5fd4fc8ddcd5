"""What every transport must do, as tests; the parts may be run alone."""

from __future__ import annotations

from kvxfer.testing.endings import EndingSuite
from kvxfer.testing.equality import EqualitySuite
from kvxfer.testing.leaks import LeakSuite
from kvxfer.testing.proofs import ProofSuite
from kvxfer.testing.unequal import UnequalSuite


class TransportSuite(EqualitySuite, UnequalSuite, ProofSuite, EndingSuite, LeakSuite):
    """Subclass it and give `make`; `kvxfer.testing.harness` says what else may be given."""
