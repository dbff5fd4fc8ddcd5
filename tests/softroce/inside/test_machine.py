"""What a test may count on in a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvxfer.verbs import logging_kept
from tests.softroce.inside.lab_hooks import LAB, LabError


@pytest.mark.parametrize("name", ["rxe0", "rxe1"])
def test_devices_are_up_and_open(name: str) -> None:
    with logging_kept():
        from pyverbs.device import Context

    context = Context(name=name)
    port = context.query_port(1)
    address = {"rxe0": "192.0.2.1", "rxe1": "198.51.100.1"}[name]
    mapped = "0000:0000:0000:0000:0000:ffff:" + ":".join(
        f"{a:02x}{b:02x}" for a, b in [(int(x), int(y)) for x, y in _pairs(address.split("."))]
    )
    assert (port.state, port.active_mtu) == (4, 5)  # active, 4096 bytes
    assert str(context.query_gid(1, 1)) == mapped
    context.close()


def test_memory_may_be_locked() -> None:
    import resource

    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def test_it_is_the_projects_python_as_root() -> None:
    assert os.getuid() == 0
    import kvxfer

    assert Path(kvxfer.__file__).is_relative_to(Path.cwd())
    assert "torch" not in sys.modules


def test_the_host_has_only_the_names_that_it_gave() -> None:
    assert subprocess.check_output(["hostname"], text=True).strip() == "lab1"
    assert not {name for name in os.environ if "TOKEN" in name or "SECRET" in name}


def test_there_is_no_other_machine() -> None:
    with pytest.raises(LabError, match="no other machine"):
        LAB.reset_other()


def _pairs(items: list[str]) -> list[tuple[str, str]]:
    return list(zip(items[::2], items[1::2], strict=True))
