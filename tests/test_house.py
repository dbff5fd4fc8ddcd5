"""The house as it is described: diagrams, import directions, light imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdbatch import states
from pdbatch.errors import IllegalTransition

ROOT = Path(__file__).resolve().parent.parent


def _arrows(heading: str) -> set[tuple[str, str]]:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split(f"\n{heading}:\n", 1)[1].split("```", 2)[1]
    return {(a, b) for a, b in re.findall(r"(\S+) --> (\S+)", section) if a != "[*]"}


@pytest.mark.parametrize(
    ("heading", "moves"), [("A job", states.JOB_MOVES), ("A shard", states.SHARD_MOVES)]
)
def test_diagrams_equal_the_tables_of_legal_moves(heading: str, moves: dict) -> None:
    assert _arrows(heading) == {(str(a), str(b)) for a, to in moves.items() for b in to}


def test_every_state_has_its_row_of_moves_and_others_are_refused() -> None:
    assert set(states.JOB_MOVES) == set(states.JobState)
    assert set(states.SHARD_MOVES) == set(states.ShardState)
    for old, allowed in states.SHARD_MOVES.items():
        for new in set(states.ShardState) - allowed:
            with pytest.raises(IllegalTransition, match=f"from {old} to {new}"):
                states.check_shard_move(old, new)


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("kvxfer", {"torch", "pyverbs", "pdbatch", "celery", "redis", "numpy"}),
        ("pdbatch", {"torch", "celery", "redis", "transformers"}),
        ("pdbatch.client", {"torch", "celery", "transformers"}),
        ("pdbatch.cli", {"torch", "celery", "sqlalchemy", "transformers", "redis"}),
        ("tasks", {"torch", "transformers"}),
    ],
)
def test_imports_stay_light(module: str, unloaded: set[str]) -> None:
    code = (
        f"import sys, {module}; print(' '.join(m for m in {sorted(unloaded)} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_import_directions_hold() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
