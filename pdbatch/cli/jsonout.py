"""JSON on stdout, for scripts."""

from __future__ import annotations

from typing import Any

import click


def print_json(value: Any) -> None:
    """One indented document."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
