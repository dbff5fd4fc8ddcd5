"""How one request of a job ended."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pdbatch.request import RequestError, RequestOutput
from pdbatch.states import ResultStatus

if TYPE_CHECKING:
    from pdbatch.store import StoredResult


class Result:
    """The terminal row of one request; its body is decoded when first asked for."""

    def __init__(self, row: StoredResult) -> None:
        self._row = row
        self.index: int = row.index
        """0-based position in the job's input."""
        self.custom_id = row.custom_id
        self.model = row.model
        self.status: ResultStatus = row.status

    def __repr__(self) -> str:
        return f"Result(index={self.index}, custom_id={self.custom_id!r}, {self.status.value})"

    @cached_property
    def output(self) -> RequestOutput:
        """Everything that is known: outputs, usage, times, workers, the error."""
        from pdbatch.formats import decode_output

        return decode_output(self._row.body)

    @property
    def text(self) -> str:
        """The text of the first output; empty for an error."""
        return self.output.outputs[0].text if self.output.outputs else ""

    @property
    def error(self) -> RequestError | None:
        """Why there is no output, where there is none."""
        return self.output.error

    def line(self) -> bytes:
        """The line of the output or error file, in the form of an OpenAI batch."""
        from pdbatch.formats import error_line, success_line

        row, write = self._row, error_line if self.error else success_line
        custom_id = row.custom_id if row.custom_id is not None else f"request-{row.index}"
        return write(custom_id, row.endpoint, row.model, self.output, row.finished_at)
