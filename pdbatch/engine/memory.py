"""A device's memory: whether an error means that there is none, and giving back what is unused."""

from __future__ import annotations

import torch

_SAID = ("out of memory", "STATUS_ALLOC_FAILED")
"""In the messages of CUDA, Triton, cuBLAS and cuDNN, whose errors have no type of their own."""


def is_shortage(error: BaseException | None) -> bool:
    """Whether a device had no memory for something, after which it goes on as before."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def release_unused() -> None:
    """Give memory that torch keeps for later back to the GPU, where there is one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
