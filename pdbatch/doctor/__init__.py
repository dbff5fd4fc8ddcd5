"""`pdbatch doctor`: what this machine has, what works, what is in the way, and what to do.

1. Software: versions, none of it imported.
2. GPUs: sysfs; then CUDA, in a process of its own, with a time limit.
3. NICs and transports: sysfs.
4. Redis, database, model, secret, memory.
5. Pairs: the workers in the store, or this machine's devices, and how KV would move.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

from kvxfer.topology import Machine, read_machine
from pdbatch.config import Settings
from pdbatch.doctor import gpus, nics, pairs, services, software
from pdbatch.doctor.report import Report

__all__ = ["Report", "examine"]


def examine(
    settings: Settings,
    *,
    machine: Machine | None = None,
    probe: gpus.Probe = gpus.ask_cuda,
    limit_s: float = gpus.PROBE_S,
) -> Report:
    """Everything about this machine under these settings; raises nothing that it can report.

    `machine` and `probe` stand in for the hardware at hand; CUDA is given `limit_s` to answer.
    """
    here = machine or read_machine()
    report = Report(host=socket.gethostname())
    looks: dict[str, Callable[[], None]] = {
        "software": lambda: software.look(report, here),
        "gpu": lambda: gpus.look(report, settings, here, probe, limit_s),
        "nics": lambda: nics.look(report, settings, here),
        "services": lambda: services.look(report, settings),
        "workers": lambda: pairs.look(report, settings),
    }
    for area, look in looks.items():
        try:
            look()
        except Exception as error:  # the rest is worth knowing all the same
            text = f"cannot be examined: {type(error).__name__}: {error}"
            report.add(area, "broken", text, "See the error; `PDBATCH_DEBUG=1` shows where.")
            if os.environ.get("PDBATCH_DEBUG") not in (None, "", "0"):
                traceback.print_exc()
    return report
