"""Weight-only quantization: linear layers of 8 or 4 bits, made from a model's own weights.

    rounding   which numbers (no data is needed)
    packed     how they lie in memory

The kernels are in `pdbatch.engine.kernels.narrow`.
"""

from __future__ import annotations
