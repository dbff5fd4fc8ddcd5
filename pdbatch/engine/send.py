"""Small lists of numbers on their way to a device, without a wait for what runs there."""

from __future__ import annotations

from typing import Any

import torch


def send(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` (numbers, lists of them, or an array) as a tensor on `device`.

    From pinned memory, which torch's allocator does not give out again before the copy is over.
    """
    if device.type != "cuda":
        return torch.as_tensor(values, dtype=dtype, device=device)
    host = torch.as_tensor(values, dtype=dtype).pin_memory()
    return host.to(device, non_blocking=True)
