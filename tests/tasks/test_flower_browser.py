"""The page of jobs in a real browser: drawn, renewed by itself, nothing wrong in its console."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from test_flower import flower, make_job, open_api

from pdbatch.store import Store

__all__ = ["flower", "open_api"]
pytestmark = pytest.mark.slow

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    """The command of a browser with a profile of its own."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium")
        pytest.skip("no chromium")
    return [found, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]


def test_the_page_of_jobs_in_a_browser(
    store: Store, flower: str, chromium: list[str], tmp_path: Path
) -> None:
    for number, (name, done) in enumerate([("prompts.jsonl", 30), ("näht & <b>.jsonl", 60)]):
        make_job(store, name, num_requests=60, num_done=done)
        worker = store.workers.register(f"decode-{number}", "host", "decode", "m", "cuda:0", {})
        store.workers.heartbeat(worker, {"free_blocks": 700, "total_blocks": 900, "running": 3})
    picture = Path(os.environ.get("SCREENSHOT", tmp_path / "jobs.png"))
    view = ["--window-size=1500,700", "--virtual-time-budget=5000"]
    subprocess.run(
        [*chromium, *view, f"--screenshot={picture}", f"{flower}/"],
        check=True,
        timeout=120,
        capture_output=True,
    )
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (1500, 700)
    assert picture.stat().st_size > 15_000, "an empty page"
    dom = subprocess.run(
        [*chromium, *view, "--dump-dom", f"{flower}/"],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    ).stdout
    assert "näht &amp; &lt;b&gt;.jsonl" in dom and "decode-1@host" in dom
    assert 'aria-valuenow="50.0"' in dom and 'aria-valuenow="100.0"' in dom
