"""Kernels that are launched while the one before them still runs (programmatic dependent launch).

A decode step of few rows is hundreds of kernels of some microseconds each, and between two of them
a GPU stands still for about one: the next is launched when the last program of the one before has
ended and what it wrote is in memory. With this launch the next kernel's programs are in place by
then and wait inside:

    after_previous   first in every program, before it reads or writes anything: the kernel before
                     is over, so what this one sees is what it would see without
    let_next         when most of a program's work is done: the next kernel may take places that
                     are free (earlier it would take them from programs that still work)

Source: CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"; Hopper and
later. Captured graphs keep it.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

_allowed = True


@triton.jit
def after_previous(DEPENDENT: tl.constexpr):
    """Wait until the kernel before is over.

    No program may end without: whoever waits for this kernel relies on its having waited.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next(DEPENDENT: tl.constexpr):
    """Let the next kernel's programs come, once all of this one's are here or have ended."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


def dependent(device: torch.device) -> dict[str, bool]:
    """Keywords for the launch of a kernel that has a `DEPENDENT` for both."""
    if _allowed and device.type == "cuda" and _serves(device.index):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


def forbid() -> None:
    """Launch all kernels of this process in the plain way from now on."""
    global _allowed
    _allowed = False


@functools.cache
def _serves(index: int | None) -> bool:
    """Whether GPU and Triton know it."""
    is_recent = torch.cuda.get_device_capability(index) >= (9, 0)
    return is_recent and torch.version.hip is None and hasattr(cuda, "gdc_wait")
