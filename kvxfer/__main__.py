"""`python -m kvxfer bench`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if sys.argv[1:2] != ["bench"]:
        sys.exit("usage: python -m kvxfer bench [--help]")
    from kvxfer.bench import main

    main(sys.argv[2:])
