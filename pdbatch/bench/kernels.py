"""Kernels that ran on a GPU during some steps, by torch's profiler, into a trace.

The profiler's events count their time from a base in nanoseconds since the Unix epoch, so they lie
under the host's stages. Recording slows the host, hence a few steps only.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from pdbatch.engine.trace import Tracer

FIRST_STEP, NUM_STEPS = 4, 24
"""Where recording begins, and how long it is."""
_GPU_PID = 10_000_000
"""Stands for a GPU where the format wants a process; above every process id."""
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


class KernelTracer:
    """A `probe.Watcher` that passes all on to `tracer`; between `begin` and `finish` it adds the
    kernels of some steps, on a GPU."""

    def __init__(self, tracer: Tracer, device: torch.device) -> None:
        self._tracer = tracer
        self._is_gpu = device.type == "cuda"
        self._steps = 0
        self._profiler: Any = None

    def begin(self) -> None:
        """Count steps from here."""
        self._steps = 0

    def stage(self, name: str, start_s: float, end_s: float, own_s: float) -> None:
        """See `probe.Watcher`."""
        self._tracer.stage(name, start_s, end_s, own_s)
        if name != "step" or not self._is_gpu:
            return
        self._steps += 1
        if self._steps == FIRST_STEP:
            activity = torch.profiler.ProfilerActivity.CUDA
            self._profiler = torch.profiler.profile(activities=[activity], acc_events=True)
            self._profiler.start()
        elif self._steps == FIRST_STEP + NUM_STEPS:
            self.finish()

    def batch(self, plan: Any, engine: Any) -> None:
        """See `probe.Watcher`."""
        self._tracer.batch(plan, engine)

    def pull(self, start_s: float, end_s: float, result: Any) -> None:
        """See `probe.Watcher`."""
        self._tracer.pull(start_s, end_s, result)

    def finish(self) -> None:
        """Stop recording and write what was recorded. Idempotent."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        torch.cuda.synchronize()
        profiler.stop()
        with tempfile.TemporaryDirectory(prefix="pdbatch-") as folder:
            path = Path(folder) / "kernels.json"
            profiler.export_chrome_trace(str(path))
            document = json.loads(path.read_text(encoding="utf-8"))
        for event in gpu_events(document):
            self._tracer.event(event)


def gpu_events(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What ran on GPUs, out of a document of torch's profiler, as events of a `Tracer`."""
    base_us = document.get("baseTimeNanoseconds", 0) / 1000
    found: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    for event in document.get("traceEvents", []):
        if event.get("ph") != "X" or event.get("cat") not in _KINDS:
            continue
        device = int(event["args"].get("device", 0))
        names[_GPU_PID + device] = f"GPU {device}"
        found.append(
            {
                "name": event["name"],
                "ph": "X",
                "ts": round(float(event["ts"]) + base_us, 3),
                "dur": event["dur"],
                "pid": _GPU_PID + device,
                "tid": int(event["args"].get("stream", 0)),
            }
        )
    named = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        for pid, name in names.items()
    ]
    return named + found
