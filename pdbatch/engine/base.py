"""What an engine is to the process around it; `engine.Engine` and `null.NullEngine` are two."""

from __future__ import annotations

from typing import Protocol

from pdbatch.engine.messages import Command, EngineInfo, Event, Stats


class EngineBase(Protocol):
    """Commands in, events out, one step at a time; used by one thread.

    Loop of the caller: hand over all commands that have come, `step`, send the events; while
    `busy`, step again at once, else wait for a command or for `fileno` to be readable.
    """

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be."""
        ...

    @property
    def busy(self) -> bool:
        """Whether another step may find something to do without anything new."""
        ...

    def handle(self, command: Command, /) -> None:
        """Take a command; what it causes comes out of the next step. `Shutdown` is not for it."""
        ...

    def step(self) -> list[Event]:
        """Do one step of work. Raises EngineError if the engine cannot go on."""
        ...

    def stats(self) -> Stats:
        """Counts of now."""
        ...

    def fileno(self) -> int:
        """Readable when work arrives that no command announces (a pull has ended)."""
        ...

    def check(self) -> None:
        """Compare the accounts of blocks with who holds them. Raises InvariantError."""
        ...

    def close(self) -> None:
        """Stop serving peers and free everything."""
        ...
