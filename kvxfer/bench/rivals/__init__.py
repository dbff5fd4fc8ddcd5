"""Other libraries for the same task, measured in the same run, in a Python that has them.

Each is a script of its own that needs nothing of kvxfer (`with_nixl.py`, `with_mooncake.py`, over
`ends.py`), started twice: once to have a pool, once to read from it. The reader measures its own
transfers, from the call to the end, with everything prepared that the library lets one prepare; the
rounds are given out by us. Both ends are stopped (SIGSTOP) while it is not their turn, since some
of their threads never sleep.
"""

from __future__ import annotations

from kvxfer.bench.rivals.driver import OURS, Rival, starting

__all__ = ["OURS", "Rival", "starting"]
