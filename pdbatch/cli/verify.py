"""`pdbatch verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pdbatch.cli.options import json_option, settings_options

if TYPE_CHECKING:
    from pdbatch.config import Settings


@click.command()
@click.option("--prompts", type=click.IntRange(1), default=64, help="So many prompts (64).")
@json_option
@settings_options("model", "device", "dtype", "kv_transport")
def verify(prompts: int, as_json: bool, settings: Settings) -> None:
    """Compare prefill and decode, KV handed over, with transformers' generate, token by token.

    Exits with 6 when a token differs.
    """
    from pdbatch.cli.jsonout import print_json
    from pdbatch.engine import verify as engine_verify

    report = engine_verify.run(settings.model, num_prompts=prompts)
    if as_json:
        print_json(report)
