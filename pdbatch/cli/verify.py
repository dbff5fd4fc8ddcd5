"""`pdbatch verify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings
    from pdbatch.engine.verify import CaseReport


@click.command()
@click.option("--prompts", type=click.IntRange(1), default=64, help="So many prompts (64).")
@click.option("--max-tokens", type=click.IntRange(1), default=24, help="Tokens of each (24).")
@click.option("--seed", type=int, default=1, help="Which prompts (1).")
@json_option
@settings_options("model", "kv_transport")
def verify(prompts: int, max_tokens: int, seed: int, as_json: bool, settings: Settings) -> None:
    """Compare prefill, hand-over and decode with transformers' generate, token by token.

    On the CPU in float32, greedy, prompts of 5 to 1,500 tokens: over each transport, with prefix
    caching on and off, and with preemption forced. Exits with 6 when a token differs.
    """
    from pdbatch.cli.jsonout import print_json
    from pdbatch.engine.verify import run
    from pdbatch.errors import EngineError

    report = run(
        settings.model,
        home=str(settings.home),
        num_prompts=prompts,
        max_tokens=max_tokens,
        transports=settings.kv_transport,
        threads=settings.worker_threads,
        seed=seed,
        progress=_tell,
    )
    if as_json:
        print_json(report)
    else:
        for case in report.cases:
            click.echo(_line(case, prompts))
    if not report.ok:
        raise EngineError(
            f"{report.model} does not give the tokens of generate in every case",
            remedy="Run it with --json to see the first difference of each prompt.",
        )


def _tell(what: str, done: int, total: int) -> None:
    """One line that is written over in a terminal; elsewhere only its end is written."""
    if sys.stderr.isatty():
        click.echo(f"\r{what}: {done} of {total}\033[K", err=True, nl=done == total)
    elif done == total:
        click.echo(f"{what}: {done} of {total}", err=True)


def _line(case: CaseReport, prompts: int) -> str:
    verdict = "ok" if case.ok else "DIFFERS"
    facts = f"{case.preemptions} preemptions, {case.pulled_bytes / 2**20:.1f} MiB pulled"
    return (
        f"{case.case.name:<28}{case.equal:>4} of {prompts} equal  {facts}, "
        f"{case.seconds:.1f} s  {verdict}"
    )
