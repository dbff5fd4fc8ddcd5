"""kvxfer: move KV caches between engines, and prove that the right bytes arrived.

A producer pins blocks and describes them, a registry says who offers what, a consumer claims,
pulls and proves. See README.md. Importing it loads the standard library alone.
"""

from __future__ import annotations

from kvxfer.consumer import KVConsumer, PullStats
from kvxfer.cuda import cuda_region
from kvxfer.descriptor import KVDescriptor, KVPart, merge_parts, token_hash
from kvxfer.errors import (
    AccessDenied,
    BadDescriptor,
    ChecksumMismatch,
    KVTransferError,
    KVUsageError,
    LayoutMismatch,
    NoTransport,
    PeerLost,
    PoolExhausted,
    ProofFailed,
    RegistryUnavailable,
    Revoked,
    StaleEpoch,
    StaleGeneration,
    TokenMismatch,
    TransferTimeout,
    TransportError,
    UnknownTransport,
    UnusableTransport,
)
from kvxfer.geometry import plan_reads
from kvxfer.layout import KVLayout
from kvxfer.memory_registry import MemoryRegistry
from kvxfer.plan import Move, ReadPlan, Span, whole_blocks
from kvxfer.producer import KVProducer
from kvxfer.redis_registry import RedisRegistry
from kvxfer.region import DeviceRegion, Region, runs
from kvxfer.registry import Claim, Ended, Publication, Registry
from kvxfer.transports import MemTransport, ShmTransport, TcpTransport
from kvxfer.transports.base import Stamp, Transport
from kvxfer.transports.cuda_ipc import CudaIpcTransport
from kvxfer.transports.rdma import RdmaTransport
from kvxfer.transports.rdma_settings import RdmaSettings

__all__ = [
    "AccessDenied",
    "BadDescriptor",
    "ChecksumMismatch",
    "Claim",
    "CudaIpcTransport",
    "DeviceRegion",
    "Ended",
    "KVConsumer",
    "KVDescriptor",
    "KVLayout",
    "KVPart",
    "KVProducer",
    "KVTransferError",
    "KVUsageError",
    "LayoutMismatch",
    "MemTransport",
    "MemoryRegistry",
    "Move",
    "NoTransport",
    "PeerLost",
    "PoolExhausted",
    "ProofFailed",
    "Publication",
    "PullStats",
    "RdmaSettings",
    "RdmaTransport",
    "ReadPlan",
    "RedisRegistry",
    "Region",
    "Registry",
    "RegistryUnavailable",
    "Revoked",
    "ShmTransport",
    "Span",
    "StaleEpoch",
    "StaleGeneration",
    "Stamp",
    "TcpTransport",
    "TokenMismatch",
    "TransferTimeout",
    "Transport",
    "TransportError",
    "UnknownTransport",
    "UnusableTransport",
    "cuda_region",
    "merge_parts",
    "plan_reads",
    "runs",
    "token_hash",
    "whole_blocks",
]
