"""A request inside the engine, and the sequences of its outputs.

Life of a sequence:

    WAITING ──► RUNNING ──► FINISHED
       ▲           │
       └─preempted─┘

A request of n outputs begins as one sequence; the others fork from it at the first token. On a
prefill engine the request ends as PINNED instead (`engine.handoff`), on a decode engine it
begins as an adoption (`engine.adoption`) and its sequences start out RUNNING, prompt computed.

Four counts, all in tokens of one sequence:

    num_prompt_tokens     the prompt's length
    num_cached_tokens     of the prompt, how many were found in the prefix cache at the start
    num_computed_tokens   how many have their KV in the sequence's blocks
    num_scheduled_tokens  how many the step that is being put together adds to that, else 0
    num_pending_tokens    how many of its tokens were sampled on the device and are not known here
                          yet: 1 while a step that gives it a token is in flight (2 for a moment)

`num_computed + num_scheduled <= num_tokens`; when they are equal the step yields a token. Tokens
count as computed from their step's launch on: what is launched later finds them in the cache.
"""

from __future__ import annotations

import enum

from pdbatch.engine.blocks import BlockHash, BlockId
from pdbatch.engine.model_input import SampledToken, SamplingState
from pdbatch.engine.ports import Detokenizer
from pdbatch.engine.stop import StopChecker
from pdbatch.request import FinishReason, KVTransfer, StageTimes
from pdbatch.sampling import SamplingParams


class SequenceState(enum.Enum):
    """Where a sequence stands."""

    WAITING = "holds no blocks and waits for its turn: new, forked without room, or preempted"
    RUNNING = "holds blocks for all its known tokens and takes part in steps"
    FINISHED = "ended, aborted or handed over; holds nothing"


class ActiveRequest:
    """One request and what its sequences have in common."""

    __slots__ = (
        "arrival",
        "arrived_at",
        "dropped",
        "eos_token_ids",
        "handed_over",
        "key",
        "max_tokens",
        "num_cached_tokens",
        "params",
        "prefill_worker",
        "priority",
        "prompt_token_ids",
        "seed",
        "sequences",
        "stage_started_at",
        "started",
        "stop_token_ids",
        "times",
        "transfer",
    )

    def __init__(
        self,
        *,
        key: str,
        arrival: int,
        priority: int,
        params: SamplingParams,
        prompt_token_ids: list[int],
        seed: int,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        now_s: float,
    ) -> None:
        self.key = key
        self.arrival = arrival
        """Order of arrival in this engine; unique."""
        self.priority = priority
        self.params = params
        self.prompt_token_ids = prompt_token_ids
        self.seed = seed
        self.eos_token_ids = eos_token_ids
        """The model's own ends; empty with `ignore_eos`."""
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.max_tokens = max_tokens
        """Most output tokens: asked for, or what the model's length leaves."""
        self.num_cached_tokens = 0
        self.started = False
        self.dropped = False
        """Aborted, failed, or here again: tokens that steps in flight choose are nobody's."""
        self.handed_over = False
        """True once it came from or left for another engine."""
        self.prefill_worker = ""
        self.times = StageTimes()
        self.transfer: KVTransfer | None = None
        """How its KV came here, if it did."""
        self.arrived_at = now_s
        self.stage_started_at = now_s
        """Monotonic seconds at which the stage under way began."""
        self.sequences = [Sequence(self, 0)]

    @property
    def finished(self) -> bool:
        """True when all outputs have ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def num_prompt_tokens(self) -> int:
        """The prompt's length."""
        return len(self.prompt_token_ids)

    def close_stage(self, now_s: float) -> float:
        """Seconds since the stage under way began; the next one begins now."""
        spent, self.stage_started_at = now_s - self.stage_started_at, now_s
        return max(0.0, spent)


class Sequence:
    """One output of a request: its tokens, its blocks, how far it is."""

    __slots__ = (
        "block_hashes",
        "block_table",
        "detokenizer",
        "finish_reason",
        "index",
        "num_computed_tokens",
        "num_flights",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_scheduled_tokens",
        "order",
        "output_token_ids",
        "pending_row",
        "prompt_token_ids",
        "reads_outputs",
        "request",
        "sampled",
        "sampling",
        "state",
        "stop_checker",
        "stop_reason",
        "table_row",
        "waits",
    )

    def __init__(self, request: ActiveRequest, index: int) -> None:
        self.request = request
        self.index = index
        """Which of the request's n outputs."""
        self.order = (request.priority, request.arrival, index)
        """Smaller runs first and is preempted last."""
        self.state = SequenceState.WAITING
        self.prompt_token_ids = request.prompt_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_flights = 0
        """Steps that were launched with it and are not retired."""
        self.block_table: list[BlockId] = []
        self.block_hashes: list[BlockHash] = []
        """Of the full blocks of known tokens, as far as they were needed."""
        self.num_registered_blocks = 0
        """Leading blocks whose hashes the pool knows."""
        self.sampling = SamplingState(
            params=request.params,
            seed=request.seed,
            output_index=index,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=self.output_token_ids,
            stop_token_ids=request.eos_token_ids | request.stop_token_ids,
        )
        self.waits = False
        """Its token in flight must be known before it can go on: no step takes it until then."""
        self.reads_outputs = self.sampling.reads_outputs
        """See `SamplingState.reads_outputs`."""
        self.pending_row = 0
        """Which row of the newest step in flight chose its pending token."""
        self.table_row = 0
        """Its row in the block tables that were packed last (`batch.Packer`)."""
        self.sampled: list[SampledToken] = []
        """Every choice with its log-probability; kept only where log-probabilities are asked."""
        self.detokenizer: Detokenizer | None = None
        self.stop_checker: StopChecker | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.key!r}[{self.index}], {self.state.name}, "
            f"{self.num_computed_tokens}+{self.num_scheduled_tokens}/{self.num_tokens} tokens, "
            f"{self.num_pending_tokens} pending{', waits' if self.waits else ''})"
        )

    @property
    def num_pending_tokens(self) -> int:
        """Its newest tokens, which are on the device alone."""
        return self.sampling.num_pending_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose values are here, prompt and output."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """All its tokens, prompt, output and pending."""
        return (
            self.num_prompt_tokens + len(self.output_token_ids) + self.sampling.num_pending_tokens
        )

    @property
    def is_ending(self) -> bool:
        """Whether the token that a step in flight chooses is its last: no step follows."""
        chosen = self.num_tokens - self.num_prompt_tokens
        return self.num_pending_tokens > 0 and chosen >= self.request.max_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is still to be computed; at least 1 while it runs."""
        return self.num_tokens - self.num_computed_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens in [start, stop)."""
        prompt = self.num_prompt_tokens
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - prompt]
