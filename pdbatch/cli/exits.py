"""Exit codes, and how an error reaches the person at the terminal.

Errors of `pdbatch.errors` carry their own code (2 to 7); these are the rest.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    import click

    from pdbatch.store import JobView

OK: Final = 0
SOME_FAILED: Final = 10
"""The job completed, and some of its requests ended in error rows."""
NOT_COMPLETED: Final = 11
"""The job was cancelled, expired, or its input failed."""
INTERNAL: Final = 70
"""A bug of ours."""
INTERRUPTED: Final = 130
"""Ctrl-C or SIGTERM."""

EXIT_CODES: Final = {
    OK: "all went well",
    1: "an error without a code of its own",
    2: "wrong usage: an option, a setting, an input or a model",
    3: "no such job",
    4: "the database refused, is missing or is at another revision",
    5: "Redis is missing, too old or unreachable",
    6: "the engine, its device or its worker failed",
    7: "the time given with --timeout is over; the job goes on",
    SOME_FAILED: "the job completed; some requests ended in error rows",
    NOT_COMPLETED: "the job was cancelled, has expired, or its input failed",
    INTERNAL: "a bug in pdbatch",
    INTERRUPTED: "interrupted",
}


def of_job(view: JobView) -> int:
    """The exit code that says how a job ended."""
    from pdbatch.states import JobState

    if view.state is not JobState.COMPLETED:
        return NOT_COMPLETED
    return OK if view.counts.succeeded == view.counts.total else SOME_FAILED


def run_and_exit(command: click.Command) -> NoReturn:
    """Runs `command` on this process's arguments; ends the process by `sys.exit`."""
    import click

    from pdbatch.errors import PdbatchError

    try:
        code = command.main(prog_name="pdbatch", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except PdbatchError as error:
        code = _told(str(error), error.remedy, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = _told("interrupted", None, INTERRUPTED)
    except OSError as error:
        code = _told(str(error), None, 2)
    except Exception as error:
        message = f"internal error: {type(error).__name__}: {error}"
        code = _told(message, "Run it again with PDBATCH_DEBUG=1 to see where.", INTERNAL)
    sys.exit(code if isinstance(code, int) else OK)


def _told(message: str, remedy: str | None, code: int) -> int:
    if os.environ.get("PDBATCH_DEBUG") not in (None, "", "0"):
        traceback.print_exc()
    one_line = " ".join(message.split())
    print(f"pdbatch: {one_line}", *([remedy] if remedy else []), sep="\n", file=sys.stderr)
    return code
