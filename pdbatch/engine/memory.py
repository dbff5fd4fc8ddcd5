"""A GPU's memory: where it went, what is left, and whether an error says that there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SAID = ("out of memory", "STATUS_ALLOC_FAILED")
"""In the messages of CUDA, Triton, cuBLAS and cuDNN, whose errors have no type of their own."""
_SPARE = 0.02
"""Share of a GPU that stays free for graphs, kernels and holes, whatever this process may use."""


def is_shortage(error: BaseException | None) -> bool:
    """Whether a device had no memory for something, after which it goes on as before."""
    torch = sys.modules.get("torch")  # an engine without it must not load it for this
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def release_unused() -> None:
    """Give memory that torch keeps for later back to the GPU, where there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A GPU before it has a pool."""

    name: str
    total_bytes: int
    weights_bytes: int
    """What this process holds through torch: the weights."""
    other_bytes: int
    """What else is taken: by other processes, and by CUDA itself in this one."""
    share: float
    """Of the total, what this process may use through torch; what is CUDA's own is not counted."""

    @classmethod
    def of(cls, device: torch.device, share: float) -> Room:
        """As it is now, but for memory that torch keeps without use."""
        import torch

        release_unused()
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        return cls(
            name=str(device),
            total_bytes=total,
            weights_bytes=held,
            other_bytes=total - free - held,
            share=share,
        )

    def left(self, step_bytes: int) -> int:
        """Bytes for a pool beside steps that need so many; below 0 if even those do not fit."""
        own = self.total_bytes * self.share - self.weights_bytes
        free = self.total_bytes * (1 - _SPARE) - self.weights_bytes - self.other_bytes
        return int(min(own, free)) - step_bytes

    def __str__(self) -> str:
        used = (self.weights_bytes, self.other_bytes, self.total_bytes)
        weights, others, total = (each / 2**30 for each in used)
        return (
            f"{self.name} has {total:.2f} GiB, of which {self.share:.0%} may be used; "
            f"weights {weights:.2f}, CUDA and other processes {others:.2f}"
        )


def taken_by(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch took from the GPU for a step at its highest, beyond what it held."""
    import torch

    release_unused()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - held
