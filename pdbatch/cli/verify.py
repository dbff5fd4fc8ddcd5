"""`pdbatch verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings
    from pdbatch.engine.verify import Case


@click.command()
@click.option("--prompts", type=click.IntRange(1), default=64, help="So many prompts (64).")
@click.option("--max-tokens", type=click.IntRange(1), default=16, help="Tokens of each (16).")
@click.option("--seed", type=int, default=0, help="Which prompts (0).")
@json_option
@settings_options("model", "kv_transport", "kv_checksum")
def verify(prompts: int, max_tokens: int, seed: int, as_json: bool, settings: Settings) -> None:
    """Compare prefill, hand-over and decode with transformers' generate, token by token.

    On the CPU in float32, greedy, prompts of 5 to 1,500 tokens: over each transport, with prefix
    caching on and off, and with preemption forced. Exits with 6 when a token differs.
    """
    from pdbatch.cli.jsonout import print_json
    from pdbatch.engine.verify import run
    from pdbatch.engine.ways import resolve
    from pdbatch.errors import EngineError

    report = run(
        settings.model,
        home=str(settings.home),
        num_prompts=prompts,
        max_tokens=max_tokens,
        transports=tuple(resolve(settings.kv_transport)),
        kv_checksum=settings.kv_checksum,
        threads=settings.worker_threads,
        seed=seed,
        progress=lambda line: click.echo(line, err=True),
    )
    if as_json:
        print_json(report)
    else:
        for case in report.cases:
            click.echo(_line(case, prompts))
    if not report.ok:
        raise EngineError(
            f"{report.model} does not give the tokens of generate in every case",
            remedy="Run it with --json to see every prompt that differs.",
        )


def _line(case: Case, prompts: int) -> str:
    verdict = "ok" if case.ok else f"DIFFERS: {case.problem or _first(case)}"
    pulled = f"{case.pulled_bytes / 2**20:.1f} MiB pulled, {case.preemptions} preemptions"
    return (
        f"{case.name}: {case.equal} of {prompts} equal, {pulled}, {case.seconds:.1f} s: {verdict}"
    )


def _first(case: Case) -> str:
    """The first prompt that differs, in words."""
    if not case.mismatches:
        return "no prompt ran"
    first = case.mismatches[0]
    where = f"prompt {first.prompt} ({first.num_prompt_tokens} tokens), token {first.position}"
    return f"{where}: {first.error}" if first.error else where
