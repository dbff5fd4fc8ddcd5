"""The least time in which a device could do a workload, from two measured rates.

A token's products cost 2 FLOP for each weight that it meets; attention costs 4 for each pair of
query and key, head and dimension. A decode step reads all weights once and the KV of its sequences.

    prefill     FLOP of all prompt tokens (a shared beginning once), over the rate of products
    decode      the longer of its FLOP over that rate, and its bytes over the rate of copies

The floor is their sum: nothing overlaps a prefill, nothing waits, no step but the fullest. Rates
are what this device reaches in one large product and in one large copy, measured in the same run.
A GPU at its limit of power does not keep the first of them up: what it reaches over seconds is the
lasting rate, and a workload of many seconds is to be held against the floor at that.
Of N devices that share a model they are N times that: what the devices tell one another is not in
the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pdbatch.bench.workloads import Asked
from pdbatch.engine.quantization.convert import HEAD_BITS, Quantization, weight_bits

_LASTING_S = 2.0
_AT_ONCE = 50
"""Runs between two looks at the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device reaches."""

    flop_s: float
    """In a product of two large matrices of the model's dtype."""
    bytes_s: float
    """In a copy on the device, what is read and what is written."""
    lasting_flop_s: float | None = None
    """In such products one after the other for seconds; None: not measured, on a CPU."""

    @property
    def lasting(self) -> Rates | None:
        """With the lasting rate of products for the best one."""
        if self.lasting_flop_s is None:
            return None
        return replace(self, flop_s=self.lasting_flop_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model's shape asks of a device."""

    body_weights: int
    """That a token meets, below the head."""
    head_weights: int
    """That a sampled token meets besides."""
    step_bytes: int
    """Of all weights, as a step of many sequences reads them."""
    kv_bytes: int
    """Of one token."""
    pair_flop: int
    """Of one pair of query and key in all layers."""


def cost_of(config: Any, dtype: torch.dtype, quantization: Quantization | None = None) -> Cost:
    """Of a decoder with gated feed-forward layers, with or without experts."""
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    attention = 2 * hidden * size * (heads + kv_heads)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    inner = int(config.intermediate_size)
    if experts:
        inner = int(getattr(config, "moe_intermediate_size", None) or inner)
    everyone = int(getattr(config, "moe_num_shared_experts", None) or 0) if experts else 0
    active = int(config.num_experts_per_tok) + everyone if experts else 1
    head = hidden * int(config.vocab_size)
    feed_forward = 3 * hidden * inner
    read = layers * (attention + feed_forward * (int(experts or 1) + everyone))
    bits = weight_bits(quantization) if quantization else 8 * dtype.itemsize
    head_bits = HEAD_BITS if quantization else 8 * dtype.itemsize
    return Cost(
        body_weights=layers * (attention + feed_forward * active),
        head_weights=head,
        step_bytes=round(read * bits / 8 + head * head_bits / 8),
        kv_bytes=layers * 2 * kv_heads * size * dtype.itemsize,
        pair_flop=4 * layers * heads * size,
    )


def floor_s(
    asked: Sequence[Asked], shared_tokens: int, places: int, cost: Cost, rates: Rates
) -> float:
    """Seconds, with at most `places` sequences in a step."""
    prompts = [len(one.prompt) for one in asked]
    prompt_tokens = sum(prompts) - shared_tokens * (len(asked) - 1)
    before = shared_tokens * (shared_tokens + 1) // 2
    pairs = sum(length * (length + 1) // 2 - before for length in prompts) + before
    prefill = 2 * cost.body_weights * prompt_tokens + cost.pair_flop * pairs
    prefill += 2 * cost.head_weights * len(asked)
    later = [one.num_output_tokens - 1 for one in asked]
    tokens = sum(later)
    if not tokens:
        return prefill / rates.flop_s
    steps = max(tokens / min(places, len(asked)), max(later))
    own = [n - shared_tokens for n in prompts]
    read = sum(n * length + n * (n + 1) // 2 for n, length in zip(later, own, strict=True))
    decode_pairs = read + shared_tokens * tokens
    decode = 2 * (cost.body_weights + cost.head_weights) * tokens + cost.pair_flop * decode_pairs
    kv_bytes = cost.kv_bytes * (read + shared_tokens * steps)
    moved = steps * cost.step_bytes + kv_bytes
    return prefill / rates.flop_s + max(decode / rates.flop_s, moved / rates.bytes_s)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few products and copies, and of products for two seconds on a GPU."""
    gpu = device.type == "cuda"
    edge, copied = (8192, 1 << 30) if gpu else (1024, 1 << 27)
    left = torch.randn(edge, edge, dtype=torch.float32, device=device).to(dtype)
    right = torch.randn(edge, edge, dtype=torch.float32, device=device).to(dtype)
    product = torch.empty_like(left)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = _best_s(lambda: torch.mm(left, right, out=product), device)
    copy_s = _best_s(lambda: target.copy_(source), device)
    flop, lasting_flop_s = 2 * edge**3, None
    if gpu:
        lasting_flop_s = flop / _lasting_s(lambda: torch.mm(left, right, out=product), device)
    return Rates(
        flop_s=flop / product_s, bytes_s=2 * copied / copy_s, lasting_flop_s=lasting_flop_s
    )


def _lasting_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run among runs without a pause, once they have gone on for a second."""
    spent: list[float] = []
    for _half in range(2):
        settle(device)
        start_s, count = time.perf_counter(), 0
        while time.perf_counter() - start_s < _LASTING_S / 2:
            for _ in range(_AT_ONCE):
                work()
            count += _AT_ONCE
            settle(device)
        spent.append((time.perf_counter() - start_s) / count)
    return spent[-1]


def _best_s(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Seconds of the fastest of some runs."""
    spent = []
    for _ in range(rounds):
        settle(device)
        start_s = time.perf_counter()
        work()
        settle(device)
        spent.append(time.perf_counter() - start_s)
    return min(spent)


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
