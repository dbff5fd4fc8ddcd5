"""Procfiles: `name: command` lines, as honcho, foreman and `pdbatch up` read them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pdbatch.errors import ConfigError
from pdbatch.local.child import ProcessSpec

DEFAULT_PROCFILE = """\
# The processes of one machine: `pdbatch up` here, or `honcho start` with the virtualenv active.
redis: pdbatch redis
reconciler: pdbatch reconciler
prefill: pdbatch worker --role prefill --name prefill-1
decode: pdbatch worker --role decode --name decode-1
flower: pdbatch flower
"""
"""What `pdbatch up` runs in a folder without a Procfile."""


def read_procfile(text: str, where: str = "Procfile") -> dict[str, str]:
    """The commands by name, in order. Raises ConfigError with the line that is wrong."""
    commands: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, command = (part.strip() for part in line.partition(":"))
        if not name or not command or name in commands:
            problem = "used twice" if name in commands else "no `name: command`"
            raise ConfigError(f"{where}, line {number}: {problem}: {line.strip()!r}")
        commands[name] = command
    if not commands:
        raise ConfigError(f"{where} names no process")
    return commands


def procfile_specs(commands: Mapping[str, str], env: Mapping[str, str]) -> list[ProcessSpec]:
    """The processes; programs are found beside our Python first. `redis` stops last.

    A command is one program with `NAME=value` before it where wanted, as the shell reads it.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    full_env = {**env, "PATH": path, "PYTHONUNBUFFERED": "1"}
    return [
        ProcessSpec(
            name=name,
            argv=("/bin/sh", "-c", f"exec env {command}"),
            env=full_env,
            stops_last=name == "redis",
        )
        for name, command in commands.items()
    ]
