"""What travels beside the KV: the request, its prompt and its first tokens, as one bytes object.

Enough for the decode engine to go on without ever seeing the request's text: prompt token ids,
sampling with the seed that is in force, the first token of each output with its log-probabilities,
and what the request used so far. msgpack; the prompt as little-endian uint32.
"""

from __future__ import annotations

import sys
from array import array

import msgspec

from pdbatch.engine.model_input import SampledToken
from pdbatch.request import StageTimes
from pdbatch.sampling import SamplingParams


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """The first token of one output, as it was sampled."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class HandoffPayload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prefilled request."""

    key: str
    prompt: bytes
    """Token ids, 4 bytes each, little-endian."""
    sampling: SamplingParams
    seed: int
    """In force: the request's own, or the one drawn from its key."""
    first: list[FirstToken]
    """One for each of the n outputs."""
    priority: int = 0
    cached_tokens: int = 0
    times: StageTimes = msgspec.field(default_factory=StageTimes)
    """Up to the hand-off."""
    prefill_worker: str = ""
    pinned_at: float = 0.0
    """Epoch seconds on the producer's clock."""


_decoder = msgspec.msgpack.Decoder(HandoffPayload)
_encoder = msgspec.msgpack.Encoder()


def encode_payload(payload: HandoffPayload) -> bytes:
    """msgpack."""
    return _encoder.encode(payload)


def decode_payload(data: bytes) -> HandoffPayload:
    """The inverse. Raises ValueError (msgspec's) with what is wrong."""
    return _decoder.decode(data)


def pack_tokens(token_ids: list[int]) -> bytes:
    """Little-endian uint32."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse. Raises ValueError if the length is no multiple of 4."""
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def first_token(sampled: SampledToken) -> FirstToken:
    """As it travels."""
    return FirstToken(sampled.token_id, sampled.logprob, sampled.top)


def sampled_token(first: FirstToken) -> SampledToken:
    """As the engine has it."""
    return SampledToken(first.token_id, first.logprob, first.top)
