"""`pdbatch run`: a batch from input to output.

1. The input is taken in; lines that are wrong become error rows.
2. Where a cluster runs (the settings name a broker, or `pdbatch up` runs here), its workers do the
   job. Else a cluster is started for the length of the job (`pdbatch.local.cluster`).
3. When the job has ended, results and errors are written in the input's order.

Ctrl-C cancels the job; the results that are ready stay in the database.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import ENGINE_OPTIONS, json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.cli.progress import ProgressDisplay
    from pdbatch.client import Client
    from pdbatch.config import Settings
    from pdbatch.job import Job
    from pdbatch.store import JobView

_LOOK_EVERY_S = 0.25


@click.command()
@click.argument("input", metavar="IN")
@click.option("--output", "-o", required=True, metavar="OUT", help="Results; - is stdout.")
@click.option("--errors", metavar="ERR", help="Failed requests, if any (errors.jsonl beside OUT).")
@click.option("--prefill", type=click.IntRange(1), default=1, help="Prefill workers to start (1).")
@click.option(
    "--decode",
    type=click.IntRange(0),
    default=1,
    help="Decode workers to start (1); 0: the others do both.",
)
@json_option
@settings_options(
    "device",
    "tensor_parallel_size",
    "dtype",
    "quantization",
    "broker_url",
    "kv_transport",
    "kv_checksum",
    "shard_size",
    *ENGINE_OPTIONS,
)
@click.option("--model", metavar="M", help="Serves the whole job; else each line's own model.")
def run(
    input: str,
    output: str,
    errors: str | None,
    prefill: int,
    decode: int,
    as_json: bool,
    model: str | None,
    settings: Settings,
) -> None:
    """Run the requests of IN (JSONL; - is stdin) and write the results to OUT, in IN's order.

    Uses the cluster that the settings name, or the one that `pdbatch up` runs; without one it
    starts Redis, workers and all, and ends them with the job.
    """
    from pdbatch.cli.exits import INTERRUPTED, of_job
    from pdbatch.cli.files import check_output
    from pdbatch.cli.progress import open_progress
    from pdbatch.client import Client

    plan = _Plan(input, output, errors or _default_errors(output), model, prefill, decode)
    check_output(plan.output)
    check_output(plan.errors)
    old = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Client(settings) as client:
            with open_progress() as progress:
                job = _submit(client, plan, progress)
                try:
                    view, start_s = _work(client, job, plan, progress)
                except KeyboardInterrupt:
                    _tell_interrupted(client, job, progress)
                    raise click.exceptions.Exit(INTERRUPTED) from None
            _write(job, view, start_s, plan, as_json=as_json)
    finally:
        signal.signal(signal.SIGTERM, old)
    raise click.exceptions.Exit(of_job(view))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the user asked for."""

    input: str
    output: str
    errors: str
    model: str | None
    prefill: int
    decode: int


def _submit(client: Client, plan: _Plan, progress: ProgressDisplay) -> Job:
    from pdbatch.cli.files import open_input

    with open_input(plan.input) as source:
        job = client.submit(
            source, model=plan.model, input_name=plan.input, on_progress=progress.ingest
        )
    progress.say(f"job {job.id}")
    return job


def _work(
    client: Client, job: Job, plan: _Plan, progress: ProgressDisplay
) -> tuple[JobView, float]:
    """Until the job has ended, by whoever's workers; how it ended, and the seconds that went
    into starting workers."""
    from pdbatch.cli.notes import note_missing_workers
    from pdbatch.local.processes import with_broker
    from pdbatch.local.redis import answers
    from pdbatch.queues import check_redis

    settings = client.settings
    embedded = with_broker(settings).broker_url or ""
    if settings.broker_url:
        check_redis(settings.broker_url)
    elif not (settings.home / "run" / "redis.sock").exists() or not answers(embedded):
        return _work_alone(client, job, plan, progress)
    progress.say("using the cluster that runs; --prefill, --decode and --device are its own matter")
    note_missing_workers(client, job.models)
    return job.wait(on_progress=progress.job), 0.0


def _work_alone(
    client: Client, job: Job, plan: _Plan, progress: ProgressDisplay
) -> tuple[JobView, float]:
    """With workers of our own."""
    from pdbatch.cli.notes import note_other_jobs
    from pdbatch.errors import PdbatchError
    from pdbatch.local.cluster import LocalCluster, plan_workers
    from pdbatch.states import TERMINAL_JOB_STATES

    view = job.status()
    if view.state in TERMINAL_JOB_STATES:  # every line was wrong
        return view, 0.0
    settings = client.settings
    plans = plan_workers(
        job.models, plan.prefill, plan.decode, settings.device, settings.tensor_parallel_size
    )
    note_other_jobs(client, job.id)
    progress.say(f"starting {len(plans)} workers; logs in {client.settings.logs}")
    started_at, start_s = time.monotonic(), 0.0
    try:
        with LocalCluster(client.settings, plans, progress.say) as cluster:
            while view.state not in TERMINAL_JOB_STATES:
                cluster.step(_LOOK_EVERY_S)
                if not cluster.all_registered:
                    cluster.health.note_registered(worker.name for worker in client.workers())
                    start_s = time.monotonic() - started_at
                view = job.status()
                cluster.health.note_done(view.counts.done)
                progress.job(view)
    except KeyboardInterrupt:
        raise
    except PdbatchError:
        client.cancel(job)  # its workers cannot start: nobody would ever end it
        raise
    return view, start_s


def _write(job: Job, view: JobView, start_s: float, plan: _Plan, *, as_json: bool) -> None:
    from pdbatch.cli.display import job_document
    from pdbatch.cli.files import write_errors, write_lines
    from pdbatch.cli.jsonout import print_json
    from pdbatch.cli.summary import print_summary

    num_results = write_lines(plan.output, job.results())
    num_errors = write_errors(plan.errors, job.errors())
    files = {"output": plan.output, "errors": plan.errors if num_errors else None}
    if as_json:
        print_json(job_document(view) | files)
    else:
        print_summary(view, start_s, plan.output, num_results, plan.errors, num_errors)


def _default_errors(output: str) -> str:
    from pathlib import Path

    return "errors.jsonl" if output == "-" else str(Path(output).with_name("errors.jsonl"))


def _tell_interrupted(client: Client, job: Job, progress: ProgressDisplay) -> None:
    state = client.cancel(job)
    counts = client.status(job).counts
    progress.say(
        f"{job.id} is {state}; {counts.succeeded:,} results are ready:"
        f" pdbatch results {job.id} --output FILE"
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
