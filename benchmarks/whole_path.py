"""What queue, database and processes cost: a job through all of pdbatch beside `LLM` alone.

    python benchmarks/whole_path.py [--model random:llama-3-8b] [--workload B] [-n 1000]
                                    [--devices cuda:0,cuda:1] [--only llm,mixed,pair,two]

The same prompts, the same engine settings, one after the other on the same devices:

    llm     `pdbatch bench`: the engine in one process, on the first device
    mixed   Redis, reconciler, SQLite and one mixed worker (Celery, its engine a process of its own)
    pair    the same with a prefill worker on the first device, a decode worker on the second
    two     the same with two mixed workers

Workers are started and warm (a small job) before the clock runs, as `LLM` is. Seconds are those
from the call of `submit` to the last row. Workers write traces, from which the rest is read:

    lead_in_s   from `submit` to the first step of any engine: ingest, feeder, claim
    tail_s      from the last step to the end of the job: the last group of rows
    waited_s    of each engine, between these two: time without a step
    decodes     sequences in a step of decodes alone, on average

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from fleet import Fleet, Usage, fresh_home

from pdbatch.bench.workloads import CPU_SCALE, WORKLOADS, Asked
from pdbatch.client import Client
from pdbatch.config import Role, Settings
from pdbatch.engine import loader, random_models
from pdbatch.states import TERMINAL_JOB_STATES
from pdbatch.store import Store

LAYOUTS: dict[str, list[Role]] = {
    "mixed": ["mixed"],
    "pair": ["prefill", "decode"],
    "two": ["mixed", "mixed"],
}
WARM = 24
WORK = ("schedule", "input", "launch", "sample", "wait", "advance")
"""Stages in which an engine is at work, on the host or waiting for its own device."""


def main() -> None:
    args = arguments()
    home = fresh_home(args.home)
    report: dict[str, Any] = {"model": args.model, "workload": args.workload, "requests": args.n}
    for name in args.only.split(","):
        try:
            report[name] = llm(args, home) if name == "llm" else layout(args, home, name)
        except Exception as error:  # the others' figures are still worth printing
            report[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(report[name])[:400], file=sys.stderr, flush=True)
        if name != "llm" and "seconds" in report.get("llm", {}) and "seconds" in report[name]:
            devices = min(len(LAYOUTS[name]), len(args.devices.split(",")))
            share = report["llm"]["seconds"] / report[name]["seconds"] / devices
            report[name]["of_llm"] = round(share, 3)
    print(json.dumps(report, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:llama-3-8b")
    parser.add_argument("--workload", default="B", choices=list(WORKLOADS))
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--devices", default="cuda:0", help="with commas: pair and two want two")
    parser.add_argument("--only", default="llm,mixed", help="some of llm,mixed,pair,two")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one part")
    parser.add_argument("--home", type=Path)
    return parser.parse_args()


def engine_settings(args: argparse.Namespace) -> dict[str, object]:
    """What all engines have in common."""
    return {
        "model": args.model,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": workload_of(args).most_tokens,
        **dict(pair.split("=", 1) for pair in args.set),
    }


def workload_of(args: argparse.Namespace) -> Any:
    """As `pdbatch bench` scales it for the device."""
    gpu = args.devices.startswith("cuda")
    return WORKLOADS[args.workload].scaled(1 if gpu else CPU_SCALE)


def asked_of(args: argparse.Namespace, count: int, seed: int) -> list[Asked]:
    """The prompts of `pdbatch bench` with this seed."""
    if random_models.is_random(args.model):
        config = random_models.config_of(args.model)
    else:
        from transformers import AutoConfig

        folder = loader.prepare(args.model, str(Settings().home))
        config = AutoConfig.from_pretrained(folder).get_text_config()
    asked: list[Asked] = workload_of(args).ask(count, config.vocab_size, seed)
    return asked


def llm(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """`pdbatch bench` in a process of its own: it must leave the device."""
    command = [sys.executable, "-m", "pdbatch.cli", "bench", "--workload", args.workload]
    command += ["-n", str(args.n), "--rounds", "1", "--json", "--home", str(home / "llm")]
    command += ["--device", args.devices.split(",")[0]]
    for key, value in engine_settings(args).items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    document = json.loads(done.stdout)
    (round_,) = document["rounds"]
    kept = ("seconds", "prompt_tokens", "output_tokens", "steps", "floor_s", "stages_s")
    return {"start_s": round(document["start_s"], 1), **{name: round_[name] for name in kept}}


def layout(args: argparse.Namespace, home: Path, name: str) -> dict[str, Any]:
    """A job through all of pdbatch, on these workers."""
    place = home / name
    place.mkdir()
    flags = {
        "home": str(place),
        "trace": str(place / "traces"),
        "shard_size": args.shard_size,
        "claim_bytes": "8GiB",
        "heartbeat_s": 1.0,
        **engine_settings(args),
    }
    settings = Settings.load(flags, env={})
    fleet = Fleet(settings, LAYOUTS[name], args.devices.split(","))
    begun = time.monotonic()
    with fleet, Store.open(settings.database_url) as store, Client(fleet.settings) as client:
        fleet.wait_ready(store, args.timeout)
        start_s = time.monotonic() - begun
        run_job(args, fleet, store, client, WARM * len(fleet.roles), -1)
        usage = Usage(fleet)
        usage.sample()
        spent = run_job(args, fleet, store, client, args.n, 0)
        usage.sample()
    return {
        "start_s": round(start_s, 1),
        **spent,
        "cpu_s": {part: round(value, 1) for part, value in usage.cpu_s.items()},
        "engines": {
            path.stem.rpartition("-")[0]: engine_figures(path, spent["clock"])
            for path in sorted((place / "traces").glob("*.json"))
        },
    }


def run_job(
    args: argparse.Namespace, fleet: Fleet, store: Store, client: Client, count: int, seed: int
) -> dict[str, Any]:
    """Submit, wait; figures of the job."""
    asked = asked_of(args, count, seed)
    lines = fleet.settings.home / f"prompts-{seed}.jsonl"
    lines.write_text("".join(_lines(asked)), encoding="utf-8")
    submit_at = time.time()
    job = client.submit(lines, model=args.model).id
    ingested_at = time.time()
    deadline = time.monotonic() + args.timeout
    while (view := store.jobs.get(job)).state not in TERMINAL_JOB_STATES:
        fleet.pump(0.1)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{view.counts}\n{fleet.tails()}")
    if view.counts.succeeded != count:
        raise RuntimeError(f"{view.counts}\n{fleet.tails()}")
    done_at = view.finished_at or 0.0
    outputs = [result.output for result in client.results(job) if result.output is not None]
    stages = ("queued_s", "prefill_s", "handoff_s", "transfer_s", "decode_s", "engine_s")
    return {
        "seconds": round(done_at - submit_at, 2),
        "ingest_s": round(ingested_at - submit_at, 2),
        "mean_s": {
            stage: round(fmean(getattr(output.times, stage) for output in outputs), 3)
            for stage in stages
        },
        "clock": [submit_at, done_at],
    }


def _lines(asked: list[Asked]) -> Iterator[str]:
    for one in asked:
        line = {
            "prompt": one.prompt,
            "max_tokens": one.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        yield json.dumps(line) + "\n"


def engine_figures(path: Path, clock: list[float]) -> dict[str, Any]:
    """How one engine spent the time between submit and end, by its trace."""
    events = [
        event
        for event in json.loads(path.read_text())
        if event["ph"] in "XC" and clock[0] <= event["ts"] / 1e6 <= clock[1]
    ]
    spans = [event for event in events if event["ph"] == "X"]
    steps = [event for event in spans if event["name"] == "launch"]
    if not steps:
        return {"steps": 0}
    first = steps[0]["ts"] / 1e6
    last = max((e["ts"] + e["dur"]) / 1e6 for e in spans if e["name"] in ("wait", "advance"))
    worked = sum(e["dur"] for e in spans if e["name"] in WORK) / 1e6
    batches = [e["args"] for e in events if e["name"] == "sequences in the step"]
    alone = [batch["decodes"] for batch in batches if batch["decodes"] and not batch["prompts"]]
    pulls = [e["dur"] / 1e3 for e in spans if e["name"] == "pull"]
    found = {
        "lead_in_s": round(first - clock[0], 2),
        "tail_s": round(clock[1] - last, 2),
        "waited_s": round(last - first - worked, 2),
        "steps": len(steps),
        "decodes": round(fmean(alone), 1) if alone else 0,
        "stages_s": {
            name: round(sum(e["dur"] for e in spans if e["name"] == name) / 1e6, 2)
            for name in (*WORK, "hand-off", "pulls")
        },
    }
    if pulls:
        found["pull_ms"] = round(fmean(pulls), 2)
    return found


if __name__ == "__main__":
    main()
