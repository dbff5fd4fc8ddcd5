"""What kvxfer asks of CUDA. Nothing here touches a device before it is used."""

from __future__ import annotations

from kvxfer.cuda.memory import cuda_region

__all__ = ["cuda_region"]
