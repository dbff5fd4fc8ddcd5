"""A handle of a job that remembers its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from pdbatch.ids import JobId
from pdbatch.result import Result
from pdbatch.states import JobState

if TYPE_CHECKING:
    from pdbatch.store import JobView


class Jobs(Protocol):
    """What a handle asks of its client, by the job's id."""

    def status(self, job: JobId, /) -> JobView:
        """See `Client.status`."""
        ...

    def wait(
        self,
        job: JobId,
        timeout_s: float | None,
        on_progress: Callable[[JobView], None] | None,
        /,
    ) -> JobView:
        """See `Client.wait`."""
        ...

    def results(self, job: JobId, /, *, follow: bool) -> Iterator[Result]:
        """See `Client.results`."""
        ...

    def errors(self, job: JobId, /, *, follow: bool) -> Iterator[Result]:
        """See `Client.errors`."""
        ...

    def cancel(self, job: JobId, /) -> JobState:
        """See `Client.cancel`."""
        ...


class Job:
    """What `Client.submit` returns; its methods are the client's, with the job filled in."""

    def __init__(self, client: Jobs, job: JobId, models: frozenset[str] = frozenset()) -> None:
        self._client = client
        self.id = job
        self.models = models
        """The models that its requests want, where this process took it in."""

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self) -> JobView:
        """See `Client.status`."""
        return self._client.status(self.id)

    def wait(
        self,
        timeout_s: float | None = None,
        on_progress: Callable[[JobView], None] | None = None,
    ) -> JobView:
        """See `Client.wait`."""
        return self._client.wait(self.id, timeout_s, on_progress)

    def results(self, *, follow: bool = False) -> Iterator[Result]:
        """See `Client.results`."""
        return self._client.results(self.id, follow=follow)

    def errors(self, *, follow: bool = False) -> Iterator[Result]:
        """See `Client.errors`."""
        return self._client.errors(self.id, follow=follow)

    def cancel(self) -> JobState:
        """See `Client.cancel`."""
        return self._client.cancel(self.id)
