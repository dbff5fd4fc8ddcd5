"""`python -m pdbatch.cli` is `pdbatch`."""

from __future__ import annotations

from pdbatch.cli import main

main()
