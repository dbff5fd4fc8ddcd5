"""Where Triton's kernels run in tests: on a GPU, or in Triton's interpreter; or not at all.

The interpreter multiplies bfloat16 by its bits; that is mended
here by widening both sides first, which is what the hardware's product amounts to.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton on this machine", allow_module_level=True)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
marks = [pytest.mark.gpu] if GPU else []


def _mend() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(data.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *others):
        return plain(self, widened(a), widened(b), d, *others)

    interpreter.InterpreterBuilder.create_dot = create_dot


if not GPU:
    _mend()
