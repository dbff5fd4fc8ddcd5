"""`pdbatch doctor`: what this machine has, what works, what is in the way, and what to do.

1. Software: versions, none of it imported.
2. GPUs: sysfs; then CUDA, in a process of its own, with a time limit.
3. NICs and transports: sysfs.
4. Redis, database, model, secret, memory.
5. Pairs: the workers in the store, or this machine's devices, and how KV would move.
"""

from __future__ import annotations

import socket

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
    software.look(report, here)
    gpus.look(report, settings, here, probe, limit_s)
    nics.look(report, settings, here)
    services.look(report, settings)
    pairs.look(report, settings)
    return report
