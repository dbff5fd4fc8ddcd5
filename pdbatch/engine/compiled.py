"""Layers that are not merged, compiled by torch: their small operations become a few kernels.

A family whose layers `merged` does not know runs as transformers wrote it, each operation a kernel
of its own. Here each such layer is compiled as a whole, attention being one operator
(`attention.operator`), with sizes left open: one program serves all equal layers and all steps, and
another a step of one token. It is compiled when it first runs, which the rehearsal sees to, and
captured into graphs of decodes like everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from pdbatch.engine.attention import operator
from pdbatch.engine.merged.layer import MergedLayer

logger = logging.getLogger(__name__)

_KINDS_OF_LAYERS = 16
"""Programs for one class of layers (windows, one token or many, one runner or several)."""


class Compiled:
    """One runner's compiled layers. A model of which all layers are merged has none."""

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        self._model = model
        self._count = compile_layers(model, backend)
        self._settled = False

    def tried(self, rehearse: Callable[[], None]) -> bool:
        """Run all that is to be compiled. False: torch refused, and layers run as they are.

        Afterwards nothing is compiled any more: what would need it runs as it is.
        """
        try:
            rehearse()
        except _refusals() as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("layers run without being compiled, which torch refuses: %s", reason)
            for layer in self._model.base_model.layers:
                layer._compiled_call_impl = None
            self._count = 0
            return False
        self._settled = True
        return True

    def run(self, body: Any, inputs: dict[str, Any]) -> Any:
        """`body(**inputs)`."""
        if not self._count or not self._settled:
            return body(**inputs)
        with torch.compiler.set_stance("eager_on_recompile"):
            return body(**inputs)


def compile_layers(model: Any, backend: str = "inductor") -> int:
    """Let layers that are not merged be compiled when they next run; how many are."""
    layers = getattr(model.base_model, "layers", None) or ()
    plain = [layer for layer in layers if not isinstance(layer, MergedLayer)]
    if not plain:
        return 0
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, _KINDS_OF_LAYERS)
    operator.name_layers(model)
    for layer in plain:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    logger.info("%d of %d layers are compiled", len(plain), len(layers))
    return len(plain)


def _refusals() -> tuple[type[Exception], ...]:
    """What torch raises for a layer that it cannot compile."""
    import torch._dynamo.exc as exc
    from torch._inductor.exc import InductorError

    return (exc.TorchDynamoException, InductorError)
