"""The command line.

`main` is the program `pdbatch`. Commands live in modules of their own that are imported when
they are called, and what they need (database, engine, display) when they run, so that
`pdbatch --help` is quick. Errors end in one line with its remedy and an exit code of
`pdbatch.cli.exits`.
"""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line of this process and exits."""
    from pdbatch.cli.app import cli
    from pdbatch.cli.exits import run_and_exit

    run_and_exit(cli)
