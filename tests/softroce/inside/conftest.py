"""These tests run in a machine of the lab, and nowhere else."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SOFTROCE_INSIDE") == "1":
        return
    for item in items:
        item.add_marker(pytest.mark.skip(f"try python -m tests.softroce.inner {item.path}"))
