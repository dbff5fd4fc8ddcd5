"""Layers that are not merged, compiled by torch: their small operations become a few kernels.

A family whose layers `merged` does not know runs as transformers wrote it, each operation a kernel
of its own. Here each such layer is compiled as a whole, attention being one operator
(`attention.operator`), with sizes left open: one program serves all equal layers and all steps, and
another a step of one token. It is compiled when it first runs, which the rehearsal sees to, and
captured into graphs of decodes like everything else.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pdbatch.engine.attention import operator
from pdbatch.engine.merged.layer import MergedLayer

logger = logging.getLogger(__name__)

_KINDS_OF_LAYERS = 16
"""Programs for one class of layers (windows, one token or many, one runner or several)."""


def compile_layers(model: Any, home: str | None, backend: str = "inductor") -> int:
    """Let layers that are not merged be compiled when they next run; how many are.

    What the compiler makes is kept in `<home>/cache/inductor`, unless the environment's
    TORCHINDUCTOR_CACHE_DIR names another folder. None: wherever torch keeps it.
    """
    layers = getattr(model.base_model, "layers", None) or ()
    plain = [layer for layer in layers if not isinstance(layer, MergedLayer)]
    if not plain:
        return 0
    if home is not None:
        folder = Path(home).expanduser() / "cache" / "inductor"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    _room_for_kinds()
    operator.name_layers(model)
    for layer in plain:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    logger.info("%d of %d layers are compiled", len(plain), len(layers))
    return len(plain)


def give_up(model: Any, error: Exception) -> None:
    """Let the layers run as they are."""
    for layer in model.base_model.layers:
        layer._compiled_call_impl = None
    reason = str(error).strip().splitlines()[0]
    logger.warning("layers run without being compiled, which torch refuses: %s", reason)


def refusals() -> tuple[type[Exception], ...]:
    """What torch raises for a layer that it cannot compile."""
    import torch._dynamo.exc as exc
    from torch._inductor.exc import InductorError

    return (exc.TorchDynamoException, InductorError)


def _room_for_kinds() -> None:
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, _KINDS_OF_LAYERS)
