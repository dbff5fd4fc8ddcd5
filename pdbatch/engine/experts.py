"""The one function that transformers calls for the experts of each mixture, each step.

transformers' grouped product is fast where an expert gets many rows, and costs some twenty small
kernels. A decode step brings a few rows to each expert: there `kernels.experts` reads each weight
once. It also takes dtypes for which torch's grouped product asks the host for offsets, which no
CUDA graph can hold.

Legend: T tokens, K experts of each token, C the model's width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    grouped_mm_experts_forward,
)

from pdbatch.engine.merged.facts import activation

IMPLEMENTATION = "pdbatch_experts"
_FEW_ROWS = 32
"""Rows of each expert, on average, up to which our kernels are the faster ones."""


def use(model: torch.nn.Module) -> int:
    """Let the model's experts run through `forward`; how many modules do. Again is harmless.

    Call it once the model's weights are where they stay (a rank's part of them, maybe).
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    count = 0
    for module in model.modules():
        kind = _kind(module)
        if kind is not None:
            module.pdbatch_kind = kind  # type: ignore[assignment]
            module.pdbatch_asks_host = _asks_host(module.down_proj)  # type: ignore[arg-type, assignment]
            module.config._experts_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]
            count += 1
    return count


def forward(
    self: Any,
    hidden_TC: torch.Tensor,
    experts_TK: torch.Tensor,
    scores_TK: torch.Tensor,
) -> torch.Tensor:
    """[T, C]: the experts' answers to each token, weighted and summed."""
    kind: str | None = getattr(self, "pdbatch_kind", None)
    few = experts_TK.numel() <= _FEW_ROWS * self.num_experts
    if kind is not None and (few or self.pdbatch_asks_host):
        run = torch.ops.pdbatch.experts if torch.compiler.is_compiling() else _kernels
        weights = (self.gate_up_proj, self.down_proj)
        out_TC: torch.Tensor = run(hidden_TC, experts_TK, scores_TK, *weights, kind)
        return out_TC
    out_TC = grouped_mm_experts_forward(self, hidden_TC, experts_TK, scores_TK)
    return out_TC


def _kernels(
    x_TC: torch.Tensor,
    experts_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    gate_up_E2IC: torch.Tensor,
    down_ECI: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    from pdbatch.engine.kernels import experts

    return experts.experts(x_TC, experts_TK, scores_TK, gate_up_E2IC, down_ECI, kind)


_SCHEMA = (
    "(Tensor x, Tensor experts, Tensor scores, Tensor gate_up, Tensor down, str kind) -> Tensor"
)
torch.library.custom_op("pdbatch::experts", _kernels, mutates_args=(), schema=_SCHEMA)
torch.library.register_fake("pdbatch::experts", lambda x_TC, *_others: torch.empty_like(x_TC))


def _asks_host(weight: torch.Tensor) -> bool:
    """Whether torch's grouped product of such weights takes its offsets by way of the host."""
    if weight.dtype != torch.bfloat16:
        return True
    return weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] not in (9, 10)


def _kind(module: Any) -> str | None:
    """The activation of a module of plain gated experts; None: it is something else."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "num_experts"):
        return None
    if not module.has_gate or module.has_bias or module.is_transposed:
        return None
    if not module.is_concatenated or type(module)._apply_gate is not _default_apply_gate:
        return None
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(weight, torch.Tensor) and weight.stride(-1) == 1 for weight in weights):
        return None
    return activation(module.act_fn)
