"""Where compiled kernels are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdbatch.engine.caches import FOLDERS, keep_compiled


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in FOLDERS:
        monkeypatch.setenv(variable, "")  # so that what is set here is taken back


def test_they_are_kept_below_the_home(tmp_path: Path) -> None:
    keep_compiled(str(tmp_path))
    for variable, name in FOLDERS.items():
        folder = Path(os.environ[variable])
        assert folder == tmp_path / "cache" / name
        assert folder.is_dir() and not any(folder.iterdir())
    keep_compiled(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists(), "the first one stays"


def test_who_names_a_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled(str(tmp_path))
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert not (tmp_path / "cache" / "triton").exists()


def test_a_home_that_cannot_be_written_breaks_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where a folder would be")
    code = (
        "import os; from pdbatch.engine.caches import FOLDERS, keep_compiled\n"
        f"keep_compiled({str(home)!r})\n"
        "for variable in FOLDERS:\n"
        "    folder = os.environ[variable]; assert os.access(folder, os.W_OK); print(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folders = done.stdout.split()
    assert len(set(folders)) == len(FOLDERS)
    assert not any(Path(folder).exists() for folder in folders), "they go with the process"
    assert "cannot be kept" in done.stderr
