"""Connections and transactions on SQLite and PostgreSQL."""

from __future__ import annotations


class Database:
    """Connections to one database."""

    def __init__(self, url: str, *, retry_s: float = 30.0) -> None:
        self.shown_url = url

    def now(self) -> float:
        """The database's clock, in seconds since the epoch."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes all connections."""
