"""`pdbatch bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pdbatch.cli.options import ENGINE_OPTIONS, json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.bench.measure import Report, Round
    from pdbatch.bench.workloads import Workload
    from pdbatch.config import Settings


@click.command()
@click.option(
    "--workload",
    "-w",
    "names",
    metavar="NAMES",
    default="A,B,C,mixed",
    help="Some of A,B,C,mixed (all).",
)
@click.option("-n", "count", type=click.IntRange(1), help="Prompts (1,000; on a CPU 16).")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of each workload (3; on a CPU 1).")
@click.option("--seed", type=click.IntRange(0), default=0, help="Which prompts (0).")
@click.option("--stages", is_flag=True, help="Wait for the device after each stage.")
@click.option("--trace", type=click.Path(dir_okay=False), help="Write a trace for Perfetto.")
@json_option
@settings_options(
    "model", "device", "tensor_parallel_size", "dtype", "quantization", *ENGINE_OPTIONS
)
def bench(
    names: str,
    count: int | None,
    rounds: int | None,
    seed: int,
    stages: bool,
    trace: str | None,
    as_json: bool,
    settings: Settings,
) -> None:
    """Measure the engine alone: tokens a second, beside what this device could do at best.

    \b
    A      1,024 tokens in, 1 out
    B      512 in, 256 out
    C      2,048 shared and 64 own in, 64 out
    mixed  32 to 4,096 in, 8 to 1,024 out, log-normal
    (on a CPU an eighth of that)

    Random token ids, greedy, no queue. --model random:llama-3-8b takes random weights of that
    shape. --stages tells where the device's time goes, and slows the whole down.
    """
    from pathlib import Path

    from pdbatch.bench import measure
    from pdbatch.bench.plan import Plan
    from pdbatch.cli.jsonout import print_json

    plan = Plan(
        model=settings.model,
        home=str(settings.home),
        device=settings.device,
        dtype=settings.dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        quantization=settings.quantization,
        workloads=_workloads(names),
        num_prompts=count,
        num_rounds=rounds,
        seed=seed,
        waits=stages,
        trace=Path(trace) if trace else None,
        engine=_engine(settings),
    )
    report = measure.run(
        plan,
        on_ready=lambda report: click.echo(_head(report), err=as_json),
        on_round=lambda round_: click.echo(_line(round_), err=as_json),
    )
    if as_json:
        print_json(report)
        return
    for name, seconds in report.medians().items():
        click.echo(f"{name}: median {seconds:.2f} s")
    if report.trace:
        click.echo(f"trace: {report.trace} (https://ui.perfetto.dev opens it)")


def _workloads(names: str) -> tuple[Workload, ...]:
    from pdbatch.bench.workloads import WORKLOADS
    from pdbatch.errors import UsageError

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in WORKLOADS]
    if unknown or not chosen:
        known = ", ".join(WORKLOADS)
        raise UsageError(f"--workload takes some of {known}, not {names!r}")
    return tuple(WORKLOADS[name] for name in chosen)


def _engine(settings: Settings) -> dict[str, Any]:
    """What the settings say of an engine, as keywords of `LLM`."""
    return {
        "compile": settings.compile,
        "block_size": settings.block_size,
        "num_blocks": settings.num_gpu_blocks,
        "kv_cache_bytes": settings.kv_cache_bytes,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_model_len": settings.max_model_len,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "threads": settings.worker_threads,
    }


def _head(report: Report) -> str:
    tokens = report.num_blocks * report.block_size
    weights = f" with weights of {report.quantization}" if report.quantization else ""
    lines = [
        f"{report.model} in {report.dtype}{weights} on {report.device},"
        f" ready after {report.start_s:.1f} s",
        f"up to {report.max_num_seqs} sequences and {report.max_num_batched_tokens:,} tokens in a"
        f" step, room for {tokens:,} tokens of KV",
        f"products {report.rates.flop_s / 1e12:.3g} TFLOP/s{_lasting(report)}, copies"
        f" {report.rates.bytes_s / 1e9:,.0f} GB/s",
    ]
    if report.scale > 1:
        lines.append(f"lengths are divided by {report.scale}: this is no GPU")
    return "\n".join(lines)


def _lasting(report: Report) -> str:
    rate = report.rates.lasting_flop_s
    return "" if rate is None else f" ({rate / 1e12:.3g} over seconds)"


def _line(done: Round) -> str:
    floor = f"{done.floor_s:.2f} s ({done.floor_s / done.seconds:.0%})"
    if (lasting := done.lasting_floor_s) is not None:
        floor += f", at the lasting rate {lasting:.2f} s ({lasting / done.seconds:.0%})"
    stages = ", ".join(f"{name} {spent:.2f}" for name, spent in done.stages_s.items())
    return (
        f"{done.workload:5s} {done.num_prompts:,} prompts (seed {done.seed}) in"
        f" {done.seconds:.2f} s: {done.in_tok_s:,.0f} tok/s in, {done.out_tok_s:,.0f} out;"
        f" floor {floor}\n"
        f"      {done.steps:,} steps; s: {stages}"
    )
