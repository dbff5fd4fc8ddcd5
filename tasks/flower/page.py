"""The handlers: `/` draws the jobs, `/api/jobs` gives them as JSON.

Both ask for what Flower's own pages and API ask for (its authentication, if it has any). The
store is read in Flower's thread pool, so a slow database does not stop the page's server.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado import ioloop, web

from pdbatch.config import Settings
from pdbatch.errors import PdbatchError
from pdbatch.store import Store
from tasks.flower.rows import as_json, read_page

TEMPLATE = str(Path(__file__).with_name("jobs.html").absolute())


@lru_cache(maxsize=1)
def _store() -> Store:
    """One store for this process, opened by the first page that needs it."""
    return Store.open(Settings.load().database_url)


async def _read(limit: int):  # type: ignore[no-untyped-def]
    """Read in a thread; a database that cannot be reached is a 503 with its reason."""
    try:
        return await ioloop.IOLoop.current().run_in_executor(
            None, lambda: read_page(_store(), limit)
        )
    except PdbatchError as error:
        raise web.HTTPError(
            503, reason="the store cannot be read", log_message=str(error)
        ) from error


class JobsView(BaseHandler):  # type: ignore[misc]
    """The first page; it renews its own tables every two seconds."""

    @web.authenticated
    async def get(self) -> None:
        """Draws the newest jobs (`?limit=`, 50) and the live workers."""
        limit = min(self.get_argument("limit", 50, type=int), 1000)
        jobs, workers = await _read(limit)
        self.set_header("Cache-Control", "no-store")
        self.render(TEMPLATE, jobs=jobs, workers=workers, limit=limit)


class JobsApi(BaseApiHandler):  # type: ignore[misc]
    """The same as JSON."""

    @web.authenticated
    async def get(self) -> None:
        """`{"jobs": [...], "workers": [...]}`."""
        limit = min(self.get_argument("limit", 50, type=int), 1000)
        self.write(as_json(*await _read(limit)))
