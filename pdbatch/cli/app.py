"""The group `pdbatch` and the table of its commands."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, NamedTuple

import click

from pdbatch.cli.exits import EXIT_CODES


class Entry(NamedTuple):
    """Where a command is, and its line in the help; hidden ones are for pdbatch's own use."""

    where: str
    help: str
    hidden: bool = False


COMMANDS: Final = {
    "run": Entry("run:run", "Run a batch from input to output, with everything it needs."),
    "submit": Entry("submit:submit", "Put a batch into the queue and print its job's id."),
    "status": Entry("status:status", "Show a job's state and counts, or the latest jobs."),
    "results": Entry("results:results", "Write a job's results in the order of its input."),
    "errors": Entry("results:errors", "Write a job's failed requests."),
    "cancel": Entry("status:cancel", "End a job; the results that are ready are kept."),
    "worker": Entry("worker:worker", "Be one worker: prefill, decode or both."),
    "up": Entry("up:up", "Keep the processes of the Procfile running."),
    "db": Entry("db:db", "Look after the database's tables."),
    "verify": Entry("verify:verify", "Compare prefill and decode with transformers' generate."),
    "bench": Entry("bench:bench", "Measure a model here, beside what the device could do."),
    "doctor": Entry("doctor:doctor", "Examine this machine and say how KV would move on it."),
    "version": Entry("version:version", "Print the versions of pdbatch and what it stands on."),
    "redis": Entry("services:redis", "Be the embedded Redis.", hidden=True),
    "reconciler": Entry("services:reconciler", "Be the feeder and reconciler.", hidden=True),
    "flower": Entry("services:flower", "Be Flower with pdbatch's page.", hidden=True),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, now imported; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].where.split(":")
        command = getattr(import_module(f"pdbatch.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(n, e.help) for n, e in COMMANDS.items() if not e.hidden])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


def _print_version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        from pdbatch import __version__

        click.echo(__version__)
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
def cli() -> None:
    """Large batches of prompts through language models, prefill and decode on different workers.

    Settings come from flags, PDBATCH_* variables and pdbatch.toml, in this order.
    """
