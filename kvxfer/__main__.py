"""`python -m kvxfer bench`."""

from __future__ import annotations

import sys

from kvxfer.bench import main

if __name__ == "__main__":
    if sys.argv[1:2] != ["bench"]:
        sys.exit("usage: python -m kvxfer bench [--json] [--mib N ...] [--block-kib N ...]")
    main(sys.argv[2:])
