"""From a worker's settings to its engine's configuration."""

from __future__ import annotations

from pdbatch.config import Settings
from pdbatch.engine.config import EngineConfig, most_seqs
from pdbatch.local.processes import LEAST_SHARDS

SHARDS_AHEAD = 2
"""Sequences that a worker has for each one that can run: when many end at once, as many wait
already, and the shards of those that ended are replaced meanwhile."""


def engine_config(settings: Settings, *, worker: str, host: str) -> EngineConfig:
    """The engine of this worker. Raises ConfigError."""
    return EngineConfig(
        model=settings.model,
        home=str(settings.home),
        role=settings.role,
        device=settings.device,
        tensor_parallel_size=settings.tensor_parallel_size,
        dtype=settings.dtype,
        quantization=settings.quantization,
        compile=settings.compile,
        block_size=settings.block_size,
        num_blocks=settings.num_gpu_blocks,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=settings.enable_prefix_caching,
        pinned_share=settings.pinned_share,
        threads=settings.worker_threads,
        listen_host=settings.listen_host,
        secret=settings.cluster_secret(),
        worker=worker,
        host=host,
        trace=str(settings.trace.absolute()) if settings.trace else "",
        engine=settings.engine,
        kv_transport=settings.kv_transport,
        kv_checksum=settings.kv_checksum,
    )


def max_seqs(settings: Settings, device: str) -> int:
    """Sequences that run at once, as the engine decides it where nothing is set."""
    return settings.max_num_seqs or most_seqs(device)


def shards_at_once(settings: Settings, device: str) -> int:
    """Shards that a worker on this device works on at once."""
    ahead = SHARDS_AHEAD * max_seqs(settings, device)
    return settings.worker_shards or max(LEAST_SHARDS, -(-ahead // settings.shard_size))
