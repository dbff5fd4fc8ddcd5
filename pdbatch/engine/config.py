"""Configuration of one engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pdbatch.errors import ConfigError

MOST_SEQS = {"cuda": 512, "cpu": 64}
MOST_BATCHED_TOKENS = {"cuda": 16384, "cpu": 2048}
"""By kind of device, where the configuration says nothing."""


def most_seqs(device: str) -> int:
    """Sequences that run at once by default on such a device (`cpu`, `cuda:1`, …)."""
    return MOST_SEQS.get(device.partition(":")[0], MOST_SEQS["cpu"])


def most_batched_tokens(device: str) -> int:
    """Tokens of a step by default on such a device."""
    return MOST_BATCHED_TOKENS.get(device.partition(":")[0], MOST_BATCHED_TOKENS["cpu"])


Role = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine's settings, checked when built. Names and meanings are vLLM's where it has any."""

    model: str
    """Alias, folder, GGUF file or hub name."""
    home: str
    """Where converted models are kept (`<home>/models`), and compiled kernels (`<home>/cache`)."""
    role: Role = "mixed"
    """prefill hands sequences off after their first token; decode adopts them; mixed does both."""
    device: str = "auto"
    """`auto` (the first GPU, else the CPU), `cpu`, `cuda:0`, …; of several ranks, `cuda:0` means
    the GPUs from 0 on, and `cuda:0,cuda:2` these."""
    tensor_parallel_size: int = 1
    """Ranks among which the model is shared, each a process with a device of its own."""
    dtype: str = "auto"
    """`auto` (float32 on the CPU, the model's own on a GPU), `float32`, `bfloat16`, `float16`."""
    quantization: Literal["wint8", "wint4"] | None = None
    """Weights of the layers rounded to 8 or 4 bits after loading; None: they stay in `dtype`."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile layers that are not merged, on a GPU with Triton; `auto` is off."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    num_blocks: int | None = None
    """Blocks in the pool; None: sized from `kv_cache_bytes` or from what is free."""
    kv_cache_bytes: int | None = None
    """Bytes of the pool; None: on a GPU what `gpu_memory_utilization` leaves, on the CPU 1 GiB."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that this process may use: weights, the largest step, and the pool;
    not CUDA's own half GiB."""
    max_num_seqs: int | None = None
    """Most sequences running at once; None: 512 on a GPU (fewer on a small one), 64 on the CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None: 16384 on a GPU (fewer on a small one), 2048 on the CPU."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt and output; None: the model's own."""
    enable_prefix_caching: bool = True
    """Find KV of equal leading blocks instead of computing it again."""
    pinned_share: float = 0.5
    """A prefill engine starts no sequence while more of its blocks than this are pinned."""
    preempt_every_steps: int | None = None
    """For verification: preempt the last decoding sequence every so many steps, need or no need."""
    cuda_graphs: bool = True
    """Capture decode steps on a GPU and replay them; without, each kernel is launched anew."""
    run_ahead: bool | None = None
    """Launch a step before the tokens of the one before it are looked at; None: on a GPU."""
    threads: int | None = None
    """torch's threads on the CPU; None: torch's default."""
    stats_interval_s: float = 0.5
    kv_transport: tuple[str, ...] = ("auto",)
    """Transports to offer and to use, best first; `auto`: all that can be used."""
    kv_checksum: bool = False
    """A prefill engine sends checksums of its blocks; a decode engine verifies those that come."""
    kv_read_timeout_s: float = 20.0
    """A pull that takes longer fails, and its request is prefilled again."""
    listen_host: str = "127.0.0.1"
    """Where the tcp transport listens."""
    secret: str = ""
    """The cluster's secret; a peer proves it before it may read."""
    worker: str = "engine"
    """The worker's name, which descriptors and outputs carry."""
    host: str = "localhost"
    """The machine's name, by which peers know that shared memory reaches them."""
    epoch: int = 0
    """The worker's life; descriptors of an earlier one are refused."""
    trace: str = ""
    """A folder for a trace of this engine (`pdbatch.engine.trace`); empty: none."""
    engine: Literal["auto", "null"] = "auto"
    """`null` runs no model: constant tokens at once, for measuring everything else."""

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, not {self.block_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError("gpu_memory_utilization must be above 0 and at most 1")
        if not 0 < self.pinned_share <= 1:
            raise ConfigError("pinned_share must be above 0 and at most 1")
        if self.compile not in ("auto", "on", "off"):
            raise ConfigError(f"compile must be auto, on or off, not {self.compile!r}")
        if self.quantization not in (None, "wint8", "wint4"):
            raise ConfigError(f"quantization must be wint8 or wint4, not {self.quantization!r}")
        counts = ("num_blocks", "kv_cache_bytes", "max_num_seqs")
        more = (
            "tensor_parallel_size",
            "max_num_batched_tokens",
            "max_model_len",
            "preempt_every_steps",
            "threads",
        )
        for name in counts + more:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
