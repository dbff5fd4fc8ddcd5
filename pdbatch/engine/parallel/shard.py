"""Which part of a model a rank keeps; made layer by layer, so that no rank holds the whole twice.

A model is shared only if every layer of it runs merged (`pdbatch.engine.merged`). Query heads
divide by the number of ranks; KV heads divide by it, or it by them: then ranks that are
neighbours keep the same KV head.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdbatch.engine import merged
from pdbatch.engine.merged.attention import MergedAttention
from pdbatch.engine.merged.feedforward import MergedMLP
from pdbatch.engine.merged.layer import MergedLayer
from pdbatch.engine.merged.norm import Norm
from pdbatch.engine.parallel.group import Group
from pdbatch.engine.parallel.layers import SharedHead, SharedNorm, Summed, SummedLinear
from pdbatch.errors import ConfigError

_REMEDY = "use --tensor-parallel-size 1, or another model (docs/operations.md lists families)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Whose part of a model this is."""

    group: Group
    num_kv_heads: int
    """Of the whole model."""


class Sharder:
    """Turns a model into this rank's part of it, in place."""

    def __init__(self, group: Group, each: Callable[[torch.nn.Module], None] | None = None) -> None:
        """`each` is called with every layer's part, on the device, before the next is made."""
        self._group, self._each = group, each

    def shard(self, model: Any) -> Shard:
        """Merge and cut every layer and the head; parts lie on the group's device afterwards.

        Raises ConfigError for a model that cannot be shared so.
        """
        config = model.config.get_text_config()
        check_heads(config, self._group.size)
        layers = model.base_model.layers
        kv_heads: set[int] = set()

        def cut(layer: MergedLayer) -> None:
            kv_heads.add(layer.self_attn.facts.num_kv_heads)
            self._layer(layer)
            if self._each is not None:
                self._each(layer)

        count = merged.merge(model, cut)
        if count < len(layers) or len(kv_heads) != 1:
            raise ConfigError(
                f"{len(layers) - count} of the model's {len(layers)} layers cannot be shared "
                f"among {self._group.size} ranks",
                remedy=_REMEDY,
            )
        model.set_output_embeddings(self._head(model.get_output_embeddings()))
        return Shard(group=self._group, num_kv_heads=kv_heads.pop())

    def config(self, config: Any) -> Any:
        """The model's configuration as this rank's kernels are to read it."""
        own = copy.copy(config)
        own.num_attention_heads = config.num_attention_heads // self._group.size
        return own

    def _layer(self, layer: MergedLayer) -> None:
        layer.self_attn = self._attention(layer.self_attn)
        if isinstance(layer.mlp, MergedMLP):
            layer.mlp = self._mlp(layer.mlp)
        else:
            layer.mlp = Summed(self._group, self._experts(layer.mlp))
        layer.to(self._group.device)

    def _attention(self, old: MergedAttention) -> MergedAttention:
        facts, size, rank = old.facts, self._group.size, self._group.rank
        q_heads = facts.num_q_heads // size
        kv_heads = max(1, facts.num_kv_heads // size)
        first_kv = rank * facts.num_kv_heads // size
        q = range(rank * q_heads, (rank + 1) * q_heads)
        k = range(facts.num_q_heads + first_kv, facts.num_q_heads + first_kv + kv_heads)
        v = range(k.start + facts.num_kv_heads, k.stop + facts.num_kv_heads)
        rows = [_scaled(heads, facts.head_dim) for heads in (q, k, v)]
        own = dataclasses.replace(facts, num_q_heads=q_heads, num_kv_heads=kv_heads)
        kv = range(first_kv, first_kv + kv_heads)
        return MergedAttention(
            own,
            self._rows(old.weight, rows),
            None if old.bias is None else self._rows(old.bias, rows),
            self._summed(old.o_proj, rows[0]),
            self._head_norm(old.q_norm, q, facts.head_dim),
            self._head_norm(old.k_norm, kv, facts.head_dim),
        )

    def _head_norm(self, norm: Norm | None, heads: range, head_dim: int) -> Norm | None:
        """A norm of each head stays; one of all heads is cut."""
        if norm is None or norm.weight.shape[0] == head_dim:
            return None if norm is None else norm.to(self._group.device)
        if len(heads) * head_dim * self._group.size != norm.weight.shape[0]:
            raise ConfigError(
                f"{self._group.size} ranks cannot share a norm over all of the model's KV heads",
                remedy="use fewer ranks than the model has KV heads",
            )
        weight = self._rows(norm.weight, [_scaled(heads, head_dim)])
        return SharedNorm(self._group, weight, norm.eps, norm.style)

    def _mlp(self, old: MergedMLP) -> MergedMLP:
        width = old.weight.shape[0] // 2
        own = self._part(width)
        rows = [own, range(width + own.start, width + own.stop)]
        bias = None if old.bias is None else self._rows(old.bias, rows)
        weight = self._rows(old.weight, rows)
        return MergedMLP(weight, bias, self._summed(old.down_proj, own), old.act_fn, old.kind)

    def _experts(self, block: Any) -> torch.nn.Module:
        """A mixture: every rank has a part of every expert, shared ones included."""
        experts: Any = getattr(block, "experts", None)
        gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
        if not isinstance(gate_up, torch.nn.Parameter) or not isinstance(down, torch.nn.Parameter):
            raise ConfigError(
                f"a feed-forward of class {type(block).__name__} cannot be shared among ranks",
                remedy=_REMEDY,
            )
        width = down.shape[-1]
        own = self._part(width)
        both = torch.cat(
            [gate_up[:, own.start : own.stop], gate_up[:, width + own.start : width + own.stop]], 1
        )
        experts.gate_up_proj = _frozen(both)
        experts.down_proj = _frozen(down[..., own.start : own.stop].contiguous())
        experts.intermediate_dim = len(own)
        if getattr(block, "shared_experts", None) is not None:
            self._plain(block.shared_experts)
        module: torch.nn.Module = block
        return module

    def _plain(self, mlp: Any) -> None:
        """An unmerged gated feed-forward within a mixture: it gives a partial sum."""
        own = self._part(mlp.down_proj.in_features)
        for name in ("gate_proj", "up_proj"):
            linear = getattr(mlp, name)
            linear.weight = _frozen(self._rows(linear.weight, [own]))
            if linear.bias is not None:
                linear.bias = _frozen(self._rows(linear.bias, [own]))
        down = mlp.down_proj
        down.weight = _frozen(down.weight[:, own.start : own.stop].contiguous())
        if down.bias is not None and self._group.rank:
            down.bias = _frozen(torch.zeros_like(down.bias))

    def _head(self, old: Any) -> SharedHead:
        """Rows of the language head, as many on each rank."""
        vocab_size = old.weight.shape[0]
        count = -(-vocab_size // self._group.size)
        first = self._group.rank * count
        parts: list[torch.Tensor | None] = []
        for whole in (old.weight, old.bias):
            if whole is None:
                parts.append(None)
                continue
            part = whole.detach().new_zeros(count, *whole.shape[1:])
            mine = whole.detach()[first : first + count]
            part[: len(mine)] = mine
            parts.append(part.to(self._group.device))
        assert parts[0] is not None
        return SharedHead(self._group, parts[0], parts[1], vocab_size)

    def _summed(self, old: Any, columns: range) -> SummedLinear:
        weight = old.weight.detach()[:, columns.start : columns.stop].contiguous()
        bias = getattr(old, "bias", None)
        device = self._group.device
        where = None if bias is None else bias.detach().to(device)
        return SummedLinear(self._group, weight.to(device), where)

    def _rows(self, whole: torch.Tensor, rows: Sequence[range]) -> torch.Tensor:
        """These rows, copied to the device."""
        parts = [whole.detach()[part.start : part.stop] for part in rows]
        return torch.cat(parts).to(self._group.device)

    def _part(self, width: int) -> range:
        """This rank's part of an inner width."""
        rank, size = self._group.rank, self._group.size
        return range(width * rank // size, width * (rank + 1) // size)


def check_heads(config: Any, size: int) -> None:
    """Raises ConfigError unless `size` ranks can share a model's heads."""
    queries = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or queries)
    if queries % size or (keys % size and size % keys):
        fitting = [
            n for n in range(1, queries + 1) if not queries % n and not (keys % n and n % keys)
        ]
        raise ConfigError(
            f"{size} ranks cannot share {queries} query heads and {keys} KV heads",
            remedy=f"use --tensor-parallel-size {', '.join(map(str, fitting))}",
        )


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _frozen(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.detach(), requires_grad=False)
