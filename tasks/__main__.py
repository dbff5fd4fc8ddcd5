"""`python -m tasks reconciler` and `python -m tasks flower`: the services beside the workers.

Settings come from the environment and `pdbatch.toml`. `pdbatch reconciler` and `pdbatch flower`
start these too.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from pdbatch.config import Settings
from pdbatch.errors import PdbatchError
from tasks.app import app, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one service; returns its exit code."""
    given = _arguments(argv)
    try:
        found = settings()
        logging.basicConfig(
            level=found.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        if given.service == "reconciler":
            return _reconciler(found)
        return _flower(found, given.address, given.port)
    except PdbatchError as error:
        remedy = f"\n{error.remedy}" if error.remedy else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return error.exit_code


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tasks", description="pdbatch's services")
    services = parser.add_subparsers(dest="service", required=True)
    services.add_parser("reconciler", help="feed the queues, put dead work back")
    flower = services.add_parser("flower", help="Flower with the page of jobs")
    flower.add_argument("--address", default="127.0.0.1", help="to listen on (127.0.0.1)")
    flower.add_argument("--port", type=int, help="the setting flower_port, else 5555")
    return parser.parse_args(argv)


def _reconciler(found: Settings) -> int:
    from tasks.service import serve

    serve(found, app)
    return 0


def _flower(found: Settings, address: str, port: int | None) -> int:
    from tasks.flower.serve import serve

    serve(app, address=address, port=port or found.flower_port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
