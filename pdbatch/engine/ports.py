"""What the scheduling side asks of its neighbours: runner, sampler, cache, tokenizer, hand-off.

The real ones are `engine.runner`, `.sampler`, `.kvcache`, `.tokenizer` and `.handoff`; tests of the
scheduling side bring smaller ones that check what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdbatch.engine.messages import Adoption, Handoff
from pdbatch.engine.model_input import ModelInput, SampledToken, SamplingState
from pdbatch.engine.payload import HandoffPayload
from pdbatch.request import KVTransfer


class Runner(Protocol):
    """One model over one cache."""

    def execute(self, batch: ModelInput, /) -> Any:
        """Logits, one row for each of `batch.logits_indices`."""
        ...


class Choice(Protocol):
    """One token for each row, chosen on the device."""

    @property
    def tokens(self) -> Any:
        """On the device, for `ModelInput.tokens_before`."""
        ...

    @property
    def corrected(self) -> Sequence[int]:
        """Rows, known after `fetch`, whose token is not the one in `tokens`: a guess failed."""
        ...

    def fetch(self) -> list[SampledToken]:
        """The tokens here; waits until they are chosen. Called once."""
        ...


class TokenSampler(Protocol):
    """Chooses tokens."""

    def choose(
        self, logits: Any, states: Sequence[SamplingState], rows: Sequence[int] | None = None, /
    ) -> Choice:
        """One token for each state, from row `rows[i]` of the logits (None: row i).

        Waits for nothing, and nothing of the states is read after it has returned.
        """
        ...


class Cache(Protocol):
    """The blocks' content."""

    def copy_blocks(self, src: Sequence[int], dst: Sequence[int], /) -> None:
        """Copy whole blocks."""
        ...


class Detokenizer(Protocol):
    """Text of one output, as its tokens come."""

    def push(self, token_ids: Sequence[int], /) -> str:
        """Settled text of the next tokens."""
        ...

    def flush(self) -> str:
        """What is still held at the end."""
        ...


class TextSource(Protocol):
    """What outputs need of a tokenizer."""

    def detokenizer(self, prompt_token_ids: Sequence[int], /) -> Detokenizer:
        """For one output."""
        ...

    def token_text(self, token_id: int, /) -> str:
        """One token as it stands in text."""
        ...


@dataclass(frozen=True, slots=True)
class Incoming:
    """A descriptor that was read and found usable: what may be pulled."""

    handoff_id: str
    payload: HandoffPayload
    prompt_token_ids: list[int]
    descriptor: Any
    """kvxfer's own; only the hand-off looks into it."""


@dataclass(frozen=True, slots=True)
class PullResult:
    """How one pull ended."""

    handoff_id: str
    num_bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    """Who moved the bytes; empty where none were."""
    code: str | None = None
    """None: the KV is here and proved right. Else the error's class name."""
    message: str = ""

    @property
    def transfer(self) -> KVTransfer | None:
        """As the request's result tells it."""
        if not self.transport:
            return None
        return KVTransfer(transport=self.transport, num_bytes=self.num_bytes)


class PullRefused(Exception):
    """A descriptor that cannot be used at all; `code` as in `PullFailed`."""

    def __init__(self, code: str, message: str, key: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.key = key


class Ranks(Protocol):
    """The other ranks of an engine whose model is shared among several."""

    def check(self) -> None:
        """Raises EngineDied if one has ended: what was computed since is of no use."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class Transfers(Protocol):
    """One engine's end of the hand-off.

    Who owns blocks: [pin, unpin) the producer; [start_pull, its PullResult) the pull, whose
    threads write them. Neither is ever given back to the pool within its interval.
    """

    def pin(
        self, handoff_id: str, blocks: Sequence[int], prompt: list[int], payload: HandoffPayload, /
    ) -> Handoff:
        """Offer these blocks' KV to peers until `unpin`; every write to them is over."""
        ...

    def unpin(self, handoff_id: str, /) -> None:
        """Stop offering."""
        ...

    def read(self, adoption: Adoption, /) -> Incoming:
        """Decode and prove a descriptor. Raises PullRefused."""
        ...

    def start_pull(self, incoming: Incoming, blocks: Sequence[int], skip: int, /) -> None:
        """Begin to read the KV into `blocks`; the first `skip` of them have it already."""
        ...

    def finished_pulls(self) -> list[PullResult]:
        """Pulls that ended since the last call; never waits."""
        ...

    def reset(self, epoch: int, /) -> None:
        """Go on under a new epoch; what was offered is void."""
        ...

    def fileno(self) -> int:
        """Readable when a pull has ended."""
        ...

    def close(self) -> None:
        """Stop serving; wait for pulls under way."""
        ...
