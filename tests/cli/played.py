"""The program with workers that are played: `python played.py MODE run …`.

MODE says what the workers do: `answer` (claim and answer everything), `idle` (be registered and do
nothing) or `broken` (end at once with an error). Redis and the supervisor are real.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path


def main() -> None:
    if sys.argv[1] == "worker":
        _be_worker(sys.argv[2])
        return
    from pdbatch.cli import main as pdbatch
    from pdbatch.local import cluster

    # Ignored in what a script runs in the background, and that is inherited; not in a terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    me, mode = str(Path(__file__).resolve()), sys.argv.pop(1)
    cluster.reconciler_argv = lambda: (sys.executable, "-c", "import signal; signal.pause()")
    cluster.worker_argv = lambda settings: (sys.executable, me, "worker", mode)
    pdbatch()


def _be_worker(mode: str) -> None:
    if mode == "broken":
        sys.exit("pdbatch: the model nix cannot be found")
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import PlayedWorker

    from pdbatch.config import Settings

    settings = Settings.load()
    worker = PlayedWorker(settings, name=settings.worker_name or "")
    while True:
        if mode == "answer" and settings.role != "decode":
            worker.work()
        time.sleep(0.05)


main()
