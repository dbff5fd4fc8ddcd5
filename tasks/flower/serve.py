"""Start Flower with our first page."""

from __future__ import annotations

from celery import Celery
from flower import urls
from flower.command import flower as flower_command
from tornado.web import url

from tasks.flower.page import JobsApi, JobsView


def install() -> None:
    """Put our handlers into Flower's list, once: `/` is ours, `/workers` stays Flower's."""
    if any(getattr(handler, "handler_class", None) is JobsView for handler in urls.handlers):
        return
    first = next(i for i, h in enumerate(urls.handlers) if getattr(h, "name", None) == "main")
    urls.handlers[first] = url(r"/", JobsView, name="main")
    urls.handlers.insert(first, url(r"/api/jobs", JobsApi, name="api_jobs"))


def serve(app: Celery, *, address: str = "127.0.0.1", port: int = 5555) -> None:
    """Run Flower for `app` until SIGTERM. Blocks. Only `address` is listened on."""
    install()
    app.start(["flower", f"--address={address}", f"--port={port}"])


__all__ = ["flower_command", "install", "serve"]
