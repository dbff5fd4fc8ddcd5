"""What is asked of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdbatch.bench.workloads import Workload
from pdbatch.engine.quantization.convert import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. None: what suits the device."""

    model: str
    home: str
    device: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    quantization: Quantization | None = None
    workloads: tuple[Workload, ...]
    num_prompts: int | None = None
    """None: 1,000 on a GPU, 16 on the CPU."""
    num_rounds: int | None = None
    """None: 3 on a GPU, 1 on the CPU."""
    seed: int = 0
    """Of the first round's prompts; each later round has the next one."""
    waits: bool = False
    """Wait for the device after each stage: tells where its time goes, and slows the whole."""
    trace: Path | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of `LLM`."""
