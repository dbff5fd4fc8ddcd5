"""The table at the end of a run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pdbatch.cli.display import summary_rows

if TYPE_CHECKING:
    from pdbatch.store import JobView


def print_summary(
    view: JobView,
    start_s: float,
    output: str,
    num_results: int,
    errors: str,
    num_errors: int,
) -> None:
    """On stdout; on stderr where the results themselves go to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=f"{view.input_name or view.id}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary_rows(view, start_s):
        table.add_row(name, value)
    table.add_row("results", f"{output} ({num_results:,} lines)")
    table.add_row("errors", f"{errors} ({num_errors:,} lines)" if num_errors else "none")
    stream = sys.stderr if output == "-" else sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 100, highlight=False)
    console.print(table, markup=False)
