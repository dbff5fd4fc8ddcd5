"""What the package promises as a library of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kvxfer

README = Path(kvxfer.__file__).with_name("README.md")


def test_the_readme_example_runs_and_is_short() -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert code is not None
    statements = [line for line in code[1].splitlines() if line.strip() and line[0] != "#"]
    assert len(statements) <= 30, len(statements)
    script = "import sys\n" + code[1] + "\nassert 'pdbatch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_all_there() -> None:
    assert sorted(kvxfer.__all__) == sorted(set(kvxfer.__all__))
    assert all(hasattr(kvxfer, name) for name in kvxfer.__all__)


def test_every_error_is_in_the_drawn_tree_and_exported() -> None:
    from kvxfer import errors

    kinds = [
        e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__
    ]
    for kind in kinds:
        assert kind.__name__ in (errors.__doc__ or "")
        assert kind.__name__ in kvxfer.__all__
