"""The GPUs: by sysfs, and by CUDA in a process of its own that cannot hang us."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvxfer.topology import Machine, distance, gpu_distance, nearest
from pdbatch.config import Settings
from pdbatch.doctor.report import Gpu, GpuPair, Report

PROBE_S: Final = 90.0
"""Importing torch from a cold disk takes some ten seconds."""
OLDEST_CAPABILITY: Final = 7.0
"""What Triton compiles for."""
PROBE_COMMAND: Final = (sys.executable, "-m", "pdbatch.doctor.probe")
Probe = Callable[[float], dict[str, Any]]


def look(
    report: Report, settings: Settings, machine: Machine, probe: Probe, limit_s: float
) -> None:
    """Fills in the GPUs and their pairs. CUDA is asked only where there is something to ask."""
    report.gpus = [_from_sysfs(machine, n) for n in range(len(machine.gpus))]
    wanted = settings.device.startswith("cuda")
    if not (wanted or machine.gpus or _device_files()):
        report.add("gpu", "note", "no NVIDIA GPU here; engines run on the CPU")
        return
    if report.versions.get("torch") is None:
        return  # said already
    seen = probe(limit_s)
    report.versions["cuda (torch)"] = seen["cuda"]
    for index, found in enumerate(seen["gpus"]):
        _merge(report, machine, f"cuda:{index}", found)
    for i, j, peer_access, *nvlinks in seen["peers"]:
        one, other = f"cuda:{i}", f"cuda:{j}"
        link = f"NV{nvlinks[0]}" if nvlinks and nvlinks[0] else _pcie(machine, report, one, other)
        report.gpu_pairs.append(
            GpuPair(one=one, other=other, peer_access=bool(peer_access), link=link)
        )
    _judge(report, settings, seen["error"])


def ask_cuda(limit_s: float) -> dict[str, Any]:
    """The probe's answer, or why there is none, after at most about `limit_s`."""
    nothing: dict[str, Any] = {"cuda": None, "gpus": [], "peers": [], "error": ""}
    process = subprocess.Popen(
        PROBE_COMMAND,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
        answer: dict[str, Any] = json.loads(out)
        return answer
    except subprocess.TimeoutExpired:
        process.kill()  # one that hangs in the driver outlives this; it is not waited for
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        return {**nothing, "error": f"no answer within {limit_s:g} s"}
    except ValueError:
        words = " ".join(err.split()[-20:])
        return {**nothing, "error": f"ended with {process.returncode}: {words}"}


def _from_sysfs(machine: Machine, number: int) -> Gpu:
    gpu = machine.gpus[number]
    nics = nearest(machine, gpu)
    return Gpu(
        pci=gpu.place.pci,
        node=gpu.place.node,
        nics=[nic.name for nic in nics],
        nic_link=gpu_distance(machine, gpu, nics[0]).link.name if nics else "",
    )


def _merge(report: Report, machine: Machine, device: str, found: dict[str, Any]) -> None:
    """What CUDA says goes to the GPU of that address, or is a GPU that sysfs does not show."""
    known = machine.gpu(found["pci"])
    gpu = next((g for g in report.gpus if known and g.pci == known.place.pci), None)
    if gpu is None:
        gpu = Gpu(pci=found["pci"])
        report.gpus.append(gpu)
    gpu.device, gpu.name, gpu.uuid = device, found["name"], found["uuid"]
    gpu.memory_bytes, gpu.capability = found["memory_bytes"], found["capability"]


def _pcie(machine: Machine, report: Report, one: str, other: str) -> str:
    places = []
    for device in (one, other):
        pci = next(gpu.pci for gpu in report.gpus if gpu.device == device)
        known = machine.gpu(pci)
        if known is None:
            return ""
        places.append(known.place)
    return distance(*places, num_nodes=len(machine.nodes)).link.name


def _judge(report: Report, settings: Settings, error: str) -> None:
    wanted = settings.device.startswith("cuda")
    shown = [gpu for gpu in report.gpus if gpu.device]
    if error or not shown:
        text = f"CUDA cannot be used: {error or 'it shows no GPU'}"
        remedy = (
            "See that `nvidia-smi` answers, that the container was given its GPUs (`--gpus all`), "
            "and that torch is a build for a CUDA no newer than the driver's."
        )
        report.add("gpu", "broken" if wanted else "warning", text, remedy)
        return
    names = ", ".join(f"{gpu.device} {gpu.name}" for gpu in shown)
    report.add("gpu", "ok", names)
    asked = [name.strip() for name in settings.device.split(",")] if wanted else []
    missing = {name for name in asked if ":" in name} - {gpu.device for gpu in shown}
    if missing:
        remedy = f"Use one of {', '.join(gpu.device for gpu in shown)}; see CUDA_VISIBLE_DEVICES."
        report.add("gpu", "broken", f"there is no device {', '.join(sorted(missing))}", remedy)
    for gpu in shown:
        if float(gpu.capability) < OLDEST_CAPABILITY:
            text = f"{gpu.device} has compute capability {gpu.capability}, below 7.0"
            report.add("gpu", "warning", text, "Use --device cpu, or a newer GPU.")
    apart = [f"{p.one} and {p.other}" for p in report.gpu_pairs if not p.peer_access]
    if apart:
        text = f"no peer access between {'; '.join(apart)}: KV goes through the driver there"
        report.add("gpu", "note", text, "Turn off PCIe ACS (and the IOMMU) where you may.")


def _device_files() -> bool:
    """Whether the driver shows anything to this process."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
