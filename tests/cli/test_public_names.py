"""What `import pdbatch` offers: a closed, lazy surface; and docs that name all there is."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import pdbatch
from pdbatch.cli.app import COMMANDS
from pdbatch.cli.exits import EXIT_CODES
from pdbatch.config import KEYS, Settings
from pdbatch.settings_text import read_value

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _imported_for_types() -> dict[str, str]:
    """Name to module, of the imports under TYPE_CHECKING."""
    tree = ast.parse(Path(pdbatch.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def test_types_loading_and_all_agree() -> None:
    assert _imported_for_types() == pdbatch._WHERE
    assert sorted(pdbatch.__all__) == sorted({*pdbatch._WHERE, "__version__"})
    assert dir(pdbatch) == sorted(pdbatch.__all__)


@pytest.mark.parametrize("name", sorted(set(pdbatch.__all__) - {"LLM"}))
def test_each_name_loads_without_torch(name: str) -> None:
    code = f"import sys; from pdbatch import {name}; print('torch' in sys.modules)"
    if name == "__version__":
        assert pdbatch.__version__ in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_llm_is_the_engine() -> None:
    assert pdbatch.LLM.__module__ == "pdbatch.engine.llm"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clyent'"):
        _ = pdbatch.Clyent


@pytest.mark.parametrize("name", [n for n, entry in COMMANDS.items() if not entry.hidden])
def test_every_command_stands_in_the_readme(name: str) -> None:
    assert f"`pdbatch {name}" in README


def test_every_setting_stands_in_the_readme_with_its_variable_rule() -> None:
    table = README.split("## Settings", 1)[1].split("\n## ", 1)[0]
    named = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert named == list(KEYS)


def test_every_exit_code_stands_in_the_readme() -> None:
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in README


def test_every_public_name_stands_in_the_readme() -> None:
    for name in pdbatch.__all__:
        assert f"`{name}`" in README, name


def test_the_readmes_defaults_are_the_defaults() -> None:
    table = README.split("## Settings", 1)[1].split("\n## ", 1)[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    for name_cell, default_cell, _ in rows:
        field = next(f for f in fields(Settings) if f.name == name_cell.strip("|` "))
        text = default_cell.strip("` ")
        default = None if field.default == "" else field.default
        assert read_value(field.name, str(field.type), text) == default or (
            isinstance(field.default, Path)
            and str(field.default.expanduser()) == str(Path(text).expanduser())
        ), field.name
