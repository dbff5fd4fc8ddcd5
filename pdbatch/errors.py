"""Everything pdbatch raises on purpose.

    PdbatchError
    ├── UsageError                 you asked for something that cannot be
    │   ├── ConfigError            a setting is unknown, malformed or contradictory
    │   ├── InputError             an input file cannot be read at all
    │   ├── UnknownJob             no job has that id
    │   └── ModelError             the model cannot be found, converted or loaded
    ├── StoreError                 the database refused, is missing or is at another revision
    │   └── IllegalTransition      a state would move where the table of legal moves has no arrow
    ├── QueueError                 Redis is missing, too old or unreachable
    ├── EngineError                the engine or its device failed
    │   ├── EngineDied             the engine's process ended
    │   └── InvariantError         the block accounts do not add up: a bug of ours
    ├── HandoffError               KV could not be handed over; the request is prefilled again
    └── WaitTimeout                a wait ended before what it waited for

A request that fails is no exception: it ends in a `RequestError` in its own row
(`pdbatch.request`), and the rest of the job goes on.
"""

from __future__ import annotations


class PdbatchError(Exception):
    """Base of all errors that pdbatch raises on purpose.

    `remedy` is one sentence that says what to do; the command line prints it
    under the message. `exit_code` is what the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class UsageError(PdbatchError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, malformed or contradicts another."""


class InputError(UsageError):
    """An input file cannot be read at all (a bad line is no InputError)."""


class UnknownJob(UsageError):
    """No job has that id."""

    exit_code = 3


class ModelError(UsageError):
    """The model cannot be found, converted or loaded."""


class StoreError(PdbatchError):
    """The database refused, is missing, or is at another revision."""

    exit_code = 4


class IllegalTransition(StoreError):
    """A state would move where the table of legal moves has no arrow."""


class QueueError(PdbatchError):
    """Redis is missing, too old or unreachable."""

    exit_code = 5


class EngineError(PdbatchError):
    """The engine or its device failed."""

    exit_code = 6


class EngineDied(EngineError):
    """The engine's process ended while work was in it."""


class InvariantError(EngineError):
    """The accounts of blocks or sequences do not add up: a bug of ours."""


class HandoffError(PdbatchError):
    """KV could not be handed over; the request is prefilled again."""


class WaitTimeout(PdbatchError):
    """A wait ended before what it waited for happened."""

    exit_code = 7


def in_words(error: BaseException) -> str:
    """What an error says, and the remedy that it knows, for who cannot be handed the error."""
    remedy = getattr(error, "remedy", None)
    return f"{error}; {remedy}" if remedy else str(error)
