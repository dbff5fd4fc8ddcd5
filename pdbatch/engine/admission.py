"""From an `EngineRequest` to an `ActiveRequest`, or to the error that ends it at once.

What can never fit is refused here, before it waits: a prompt beyond the model's length or
beyond the whole pool, and `max_tokens` that the length does not leave. Everything that is
admitted can run alone, so the scheduler never meets a sequence that no preemption helps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pdbatch.engine.messages import EngineRequest
from pdbatch.engine.outputs import failure
from pdbatch.engine.payload import HandoffPayload
from pdbatch.engine.rng import seed_from_key
from pdbatch.engine.sequence import ActiveRequest
from pdbatch.engine.tokenizer import PromptError
from pdbatch.request import RequestOutput, RequestSpec


class Encoder(Protocol):
    """Turns prompts into token ids."""

    def encode(self, spec: RequestSpec, /) -> list[int]:
        """Raises PromptError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a sequence may get in one engine."""

    max_model_len: int
    """Tokens of a sequence, prompt and output."""
    capacity_tokens: int
    """Tokens that the whole pool holds."""
    hands_off: bool
    """True for a prefill engine: only the prompt must fit into its own pool."""

    @property
    def longest(self) -> int:
        """Most tokens of a sequence that lives here to its end (its last token has no KV)."""
        return min(self.max_model_len, self.capacity_tokens + 1)

    def refusal(self, num_prompt: int, max_tokens: int | None) -> str | None:
        """Why a request of this size can never run; None if it can."""
        limit = self.max_model_len if self.hands_off else self.longest
        if num_prompt > self.capacity_tokens or num_prompt >= limit:
            room = min(limit - 1, self.capacity_tokens)
            return f"the prompt has {num_prompt} tokens and at most {room} are possible; shorten it"
        if max_tokens is not None and num_prompt + max_tokens > limit:
            return (
                f"prompt ({num_prompt} tokens) and max_tokens ({max_tokens}) are "
                f"{num_prompt + max_tokens} together, the limit is {limit}; lower max_tokens"
            )
        return None


class Admission:
    """Makes requests; numbers them in order of arrival."""

    def __init__(
        self, encoder: Encoder, limits: Limits, eos_token_ids: Iterable[int], worker: str
    ) -> None:
        self._encoder = encoder
        self._limits = limits
        self._eos = frozenset(eos_token_ids)
        self._worker = worker
        self._arrivals = itertools.count()

    def admit(self, request: EngineRequest, now_s: float) -> ActiveRequest | RequestOutput:
        """A request from its start, or the error that is its result."""
        params = request.spec.sampling
        try:
            prompt = self._encoder.encode(request.spec)
        except PromptError as error:
            param = f"body.{error.param}"
            return self._failure(request.key, "invalid_request", str(error), param)
        refusal = self._limits.refusal(len(prompt), params.max_tokens)
        if refusal is not None:
            return self._failure(request.key, "context_length_exceeded", refusal, None)
        seed = params.seed if params.seed is not None else seed_from_key(request.key)
        active = ActiveRequest(
            key=request.key,
            arrival=next(self._arrivals),
            priority=request.priority,
            params=params,
            prompt_token_ids=prompt,
            seed=seed,
            eos_token_ids=frozenset() if params.ignore_eos else self._eos,
            max_tokens=self._max_tokens(params.max_tokens, len(prompt)),
            now_s=now_s,
        )
        active.prefill_worker = self._worker
        return active

    def adopt(
        self, payload: HandoffPayload, prompt: list[int], now_s: float
    ) -> ActiveRequest | RequestOutput:
        """A request that another engine prefilled, or its error if it can never fit here."""
        params = payload.sampling
        refusal = self._limits.refusal(len(prompt), params.max_tokens)
        if refusal is not None:
            return failure(
                payload.key, "context_length_exceeded", refusal, worker=payload.prefill_worker
            )
        active = ActiveRequest(
            key=payload.key,
            arrival=next(self._arrivals),
            priority=payload.priority,
            params=params,
            prompt_token_ids=prompt,
            seed=payload.seed,
            eos_token_ids=frozenset() if params.ignore_eos else self._eos,
            max_tokens=self._max_tokens(params.max_tokens, len(prompt)),
            now_s=now_s,
        )
        active.times = payload.times
        active.num_cached_tokens = payload.cached_tokens
        active.prefill_worker = payload.prefill_worker
        active.started = True
        return active

    def _max_tokens(self, asked: int | None, num_prompt: int) -> int:
        limit = self._limits.max_model_len if self._limits.hands_off else self._limits.longest
        return asked if asked is not None else limit - num_prompt

    def _failure(self, key: str, code: str, message: str, param: str | None) -> RequestOutput:
        return failure(key, code, message, param=param, worker=self._worker)
