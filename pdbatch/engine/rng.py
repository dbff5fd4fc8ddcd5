"""Random numbers that depend on what is sampled, not on where, when or beside whom.

One uniform for each (seed, output, position): a counter-based hash in 64-bit integers,
computed on the host for any device, so a request that is retried elsewhere samples the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_OUTPUT = np.uint64(0xD1B54A32D192ED03)


def uniforms(
    seeds: list[int], output_indices: list[int], positions: list[int]
) -> npt.NDArray[np.float32]:
    """One float32 for each row, evenly spread and strictly between 0 and 1.

    Seeds are taken modulo 2**64. Values are odd multiples of 2**-24, hence exact in float32.
    """
    seed = np.array([value & 0xFFFFFFFFFFFFFFFF for value in seeds], dtype=np.uint64)
    output = np.array(output_indices, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    key = _mix(_mix(seed + _GOLDEN) + output * _OUTPUT)
    bits = _mix(key + (position + np.uint64(1)) * _GOLDEN) >> np.uint64(41)
    return ((bits.astype(np.float64) + 0.5) * 2.0**-23).astype(np.float32)


def seed_from_key(key: str) -> int:
    """A seed for a request that names none: the same wherever the request runs."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    mixed: npt.NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed
