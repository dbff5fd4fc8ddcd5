"""Everything kvxfer raises on purpose.

KVTransferError
├── KVUsageError               you misused it: nothing was moved
│   ├── LayoutMismatch         the two ends keep KV in different shapes
│   ├── BadDescriptor          bytes that are no descriptor
│   ├── PoolExhausted          not enough blocks at the destination
│   ├── UnknownTransport       a name that no transport has; `remedy` says what to do
│   └── UnusableTransport      one that was asked for and cannot be used here; likewise
├── ProofFailed                bytes came, but they are not proved to be the right ones
│   ├── StaleEpoch             the producer's life that published them is over
│   ├── StaleGeneration        a block was given to other content before the read ended
│   ├── TokenMismatch          the KV belongs to other tokens
│   └── ChecksumMismatch       the bytes were damaged on their way
├── TransportError             the way failed; `errno` says how where the system did
│   ├── PeerLost               the producer's process or machine is gone
│   ├── TransferTimeout        no end within the given time
│   ├── Revoked                the producer no longer lets the region be read
│   ├── AccessDenied           the peers do not share a secret
│   └── NoTransport            no transport that both ends have reaches the other
└── RegistryUnavailable        the registry cannot be reached; try again
"""

from __future__ import annotations


class KVTransferError(Exception):
    """Base of all errors of this library. `errno` is the system's, or None."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class KVUsageError(KVTransferError):
    """The caller misused the library; nothing was moved."""


class LayoutMismatch(KVUsageError):
    """The two ends keep KV in different shapes."""


class BadDescriptor(KVUsageError):
    """Bytes that are no descriptor."""


class PoolExhausted(KVUsageError):
    """Not enough blocks at the destination."""


class UnknownTransport(KVUsageError):
    """A name that no transport has. `remedy` is one sentence that says what to do."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class UnusableTransport(KVUsageError):
    """A transport that was asked for cannot be used here. `remedy` as above."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class ProofFailed(KVTransferError):
    """Bytes came, but they are not proved to be the right ones. Never decode them."""


class StaleEpoch(ProofFailed):
    """The producer's life that published them is over."""


class StaleGeneration(ProofFailed):
    """A block was given to other content before the read ended."""


class TokenMismatch(ProofFailed):
    """The KV belongs to other tokens."""


class ChecksumMismatch(ProofFailed):
    """The bytes were damaged on their way."""


class TransportError(KVTransferError):
    """The way failed."""


class PeerLost(TransportError):
    """The producer's process or machine is gone."""


class TransferTimeout(TransportError):
    """No end within the given time."""


class Revoked(TransportError):
    """The producer no longer lets the region be read."""


class AccessDenied(TransportError):
    """The peers do not share a secret."""


class NoTransport(TransportError):
    """No transport that both ends have reaches the other."""


class RegistryUnavailable(KVTransferError):
    """The registry cannot be reached; try again."""
