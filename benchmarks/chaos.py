"""A job that is disturbed all the time, beside the same job left alone.

    python benchmarks/chaos.py [--requests 2000] [--events 50] [--seed N] [--database sqlite]

At random moments one of these happens, each to a process that is chosen at random: SIGKILL of a
prefill worker, of a decode worker (main process, or its engine alone), of the reconciler, of Redis;
SIGSTOP of a worker for longer than its time to live; Redis emptied. The supervisor starts again
what ended. At the end: each request has exactly one row, each row equals the undisturbed run's,
no block is held on any worker, and rows are written again within 15 s of a disturbance (of the last
one, where the next came before the workers were back).

Prints its seed, then one JSON object; exits 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import redis
from control_plane import postgresql
from fleet import Fleet, fresh_home
from tiny_model import make_tiny_model

from pdbatch.client import Client
from pdbatch.config import Role, Settings
from pdbatch.states import TERMINAL_JOB_STATES
from pdbatch.store import Store

ROLES: list[Role] = ["prefill", "prefill", "decode", "decode"]
KINDS = (
    *("kill prefill", "kill decode", "kill engine") * 2,
    *("stop prefill", "stop decode"),
    *("kill reconciler", "kill redis", "empty redis"),
)
BACK_TO_WORK_S = 15.0


@dataclass(slots=True)
class Event:
    """One disturbance."""

    kind: str
    target: str
    at_s: float
    rows_before: int
    back_s: float | None = None
    """Until the first new row; None: the next disturbance came before it, or the job's end."""


def write_lines(path: Path, requests: int, rng: random.Random, max_tokens: int) -> None:
    """Requests of many lengths; a third share a prefix, some sample, some want two outputs."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
    shared = " ".join(rng.choice(words) for _ in range(60))
    with path.open("w", encoding="utf-8") as file:
        for number in range(requests):
            text = " ".join(rng.choice(words) for _ in range(rng.randint(4, 80)))
            line: dict[str, object] = {
                "id": f"r-{number}",
                "prompt": f"{shared} {text}" if number % 3 == 0 else text,
                "max_tokens": rng.randint(1, max_tokens),
                "temperature": rng.choice([0, 0, 0.8]),
                "top_k": 8,  # of a random model's thousands of likely tokens, those far apart
                "seed": number,
                "n": 2 if number % 50 == 0 else 1,
            }
            file.write(json.dumps(line) + "\n")


def answers(client: Client, job: str) -> dict[str, object]:
    """What was answered to each line, by custom_id; raises on a line that comes twice."""
    found: dict[str, object] = {}
    for result in client.results(job):
        name = result.custom_id or ""
        assert name not in found, f"two rows for {name}"
        found[name] = [
            (output.index, output.text, output.token_ids, output.finish_reason)
            for output in result.output.outputs
        ]
    return found


class Chaos:
    """Chooses and does the disturbances; keeps what is stopped, and until when."""

    def __init__(self, fleet: Fleet, rng: random.Random, seconds_stopped: float) -> None:
        self.fleet, self.rng, self.seconds_stopped = fleet, rng, seconds_stopped
        self.stopped: dict[str, float] = {}

    def strike(self, kind: str) -> str:
        """Do one disturbance; returns whom it met, or "" where nobody was there."""
        verb, what = kind.split()
        if what == "redis":
            return self._redis(verb)
        if what == "reconciler":
            return "reconciler" if self.fleet.send("reconciler", signal.SIGKILL) else ""
        role = self.rng.choice(["prefill", "decode"]) if what == "engine" else what
        names = [n for n in self.fleet.names() if n.startswith(role) and n not in self.stopped]
        names = [n for n in names if len(self.fleet.family(n)) > 1]
        if not names:
            return ""
        name = self.rng.choice(names)
        if what == "engine":
            self.fleet.family(name)[-1].kill()
        elif verb == "stop":
            self.fleet.send(name, signal.SIGSTOP)
            self.stopped[name] = time.monotonic() + self.seconds_stopped
        else:
            self.fleet.family(name)[0].kill()
        return name

    def _redis(self, verb: str) -> str:
        if verb == "kill":
            return "redis" if self.fleet.send("redis", signal.SIGKILL) else ""
        url = (self.fleet.settings.broker_url or "").replace("redis+socket", "unix")
        try:
            redis.Redis.from_url(url).flushall()
        except redis.RedisError:
            return ""
        return "redis"

    def wake(self, everybody: bool = False) -> None:
        """SIGCONT to those whose time has come."""
        for name, until in list(self.stopped.items()):
            if everybody or time.monotonic() >= until:
                self.fleet.send(name, signal.SIGCONT)
                del self.stopped[name]


def calm_run(settings: Settings, lines: Path) -> dict[str, object]:
    """The same job, undisturbed, on one mixed worker."""
    home = settings.home / "calm"
    home.mkdir()
    calm = replace(settings, home=home, database_url=f"sqlite:///{home}/pdbatch.db", log_dir=None)
    with Fleet(calm, ["mixed"]) as fleet, Client(fleet.settings) as client:
        job = client.submit(lines).id
        fleet.wait_for("calm run", lambda: client.status(job).state in TERMINAL_JOB_STATES, 1800)
        return answers(client, job)


def disturbed_run(
    settings: Settings, lines: Path, rng: random.Random, args: argparse.Namespace
) -> dict[str, object]:
    """The job under chaos; the report."""
    events: list[Event] = []
    fleet = Fleet(settings, ROLES)
    with fleet, Client(fleet.settings) as client, Store.open(settings.database_url) as store:
        fleet.wait_ready(store)
        chaos = Chaos(fleet, rng, settings.worker_ttl_s * 1.5)
        job = client.submit(lines).id
        start = time.monotonic()
        next_at = start + 3.0
        waiting: list[Event] = []
        while (view := store.jobs.get(job)).state not in TERMINAL_JOB_STATES:
            fleet.pump(0.05)
            now, rows = time.monotonic(), view.counts.done
            if waiting and rows > waiting[-1].rows_before:
                waiting[-1].back_s = round(now - start - waiting[-1].at_s, 2)
                waiting.clear()
            chaos.wake()
            if now >= next_at and len(events) < args.events:
                kind = rng.choice(KINDS)
                if target := chaos.strike(kind):
                    events.append(Event(kind, target, round(now - start, 2), rows))
                    waiting.append(events[-1])
                    print(f"{now - start:7.1f} s {rows:5d} rows  {kind}: {target}", flush=True)
                    next_at = now + rng.expovariate(1 / args.pause)
            if now - start > args.timeout:
                raise TimeoutError(f"{view.counts}\n{fleet.tails()}")
        took_s = time.monotonic() - start
        chaos.wake(everybody=True)
        fleet.wait_ready(store)
        fleet.wait_for("idle workers", lambda: not held_blocks(store, fleet), 60.0)
        found = answers(client, job)
        return {
            "took_s": round(took_s, 1),
            "events": dict(Counter(event.kind for event in events)),
            "num_events": len(events),
            "slowest_back_to_work_s": max((e.back_s or 0 for e in events), default=0),
            "held_blocks": held_blocks(store, fleet),
            "errors": view.counts.done - view.counts.succeeded,
            "answers": found,
            "log": [asdict(event) for event in events],
        }


def held_blocks(store: Store, fleet: Fleet) -> dict[str, object]:
    """Workers that still hold blocks or requests, by what they last said."""
    held: dict[str, object] = {}
    for worker in store.workers.list():
        stats = worker.stats
        busy = {
            key: stats.get(key)
            for key in ("used_blocks", "pinned_requests", "running", "waiting", "pulling")
            if stats.get(key) != 0
        }
        if busy and worker.name in fleet.names():
            held[worker.name] = busy
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--pause", type=float, default=6.0, help="mean seconds between two events")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--engine", choices=["auto", "null"], default="auto")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--models", type=Path, default=Path.home() / ".pdbatch")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    home = fresh_home(args.home)
    lines = home / "prompts.jsonl"
    write_lines(lines, args.requests, rng, args.max_tokens)
    model = str(make_tiny_model(home / "tiny", str(args.models)))
    source = postgresql() if args.database == "postgresql" else nullcontext("")
    with source as url:
        settings = Settings(
            home=home,
            database_url=url,
            model=model,
            engine=args.engine,
            worker_threads=1,
            max_attempts=1000,
            max_num_seqs=32,
            num_gpu_blocks=2048,
            worker_ttl_s=5.0,
            heartbeat_s=1.0,
            shard_size=32,
        )
        expected = calm_run(settings, lines)
        report = disturbed_run(settings, lines, rng, args)
    found = report.pop("answers")
    assert isinstance(found, dict)
    report |= {
        "seed": seed,
        "requests": args.requests,
        "lost": len(expected.keys() - found.keys()),
        "unequal": sum(found[key] != expected[key] for key in found.keys() & expected.keys()),
        "home": str(home),
    }
    slowest = report["slowest_back_to_work_s"]
    good = not (report["lost"] or report["unequal"] or report["held_blocks"] or report["errors"])
    print(json.dumps(report, indent=2))
    if int(str(report["num_events"])) < args.events:
        sys.exit(f"the job ended before {args.events} events: take a shorter --pause or more work")
    sys.exit(0 if good and float(str(slowest)) < BACK_TO_WORK_S else 1)


if __name__ == "__main__":
    main()
