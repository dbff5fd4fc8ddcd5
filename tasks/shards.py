"""The task of a shard: what a message of the feeder asks a prefill or mixed worker to run.

Only `tasks.pool` can run it: it claims the shard and lets the engine run its requests; the body
fetches the outcome at the end. The message's arguments are ids; the requests are in the store.
"""

from __future__ import annotations

from typing import Any

from pdbatch.queues import PREFILL_TASK
from tasks import handover
from tasks.app import app


@app.task(name=PREFILL_TASK, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
def prefill(self: Any, *, job: str, shard: int, attempt: int) -> None:
    """Shard `shard` of `job`, in its try number `attempt`. Raises WrongPool in other pools."""
    handover.fetch(self.request.id)
