"""Kernels that begin while the one before them still runs (programmatic dependent launch).

A kernel launched with `launch_pdl` may start as soon as every program of the kernel before it has
said so or ended; it must `gdc_wait` before it touches what that kernel, or any earlier one, reads
or writes. What it does before is for itself: asking for weights, which nobody writes. Kernels that
say so early are launched the plain way themselves, and hence after all before them has ended.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether this device has such launches: from Hopper on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
