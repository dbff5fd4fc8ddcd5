"""What the scheduling side hands to the model side for one step, and what comes back.

Legend: T scheduled tokens of all sequences, S scheduled sequences, V vocabulary,
M most blocks of one sequence in this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pdbatch.sampling import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """One step's batch, packed: sequence after sequence, no padding between them.

    Lists and tensors alike are in the scheduler's order: decodes (one token each) first.
    """

    input_ids_T: torch.Tensor
    """int64, CPU. Token ids to run; -1 - r stands for row r of `tokens_before`."""
    positions_T: torch.Tensor
    """int64, CPU. Position of each token in its own sequence."""
    slot_mapping_T: torch.Tensor
    """int64, CPU. Where each token's K and V are written: block * block_size + offset."""
    cu_seqlens_q: list[int]
    """S + 1 offsets into T: sequence s owns [cu_seqlens_q[s], cu_seqlens_q[s + 1])."""
    context_lens: list[int]
    """S. Tokens of each sequence in the cache after this step, these tokens included."""
    block_tables_SM: torch.Tensor
    """int32, CPU. Blocks of each sequence in order, padded with 0."""
    logits_indices: list[int]
    """Which sequences need logits: those whose known tokens are all in the cache after it."""
    num_decodes: int
    """The first so many sequences have one token each and more than one in the cache."""
    tokens_before: Any = None
    """The tokens that the step before chose, on the device; None where no id is negative."""


@dataclass(slots=True, kw_only=True)
class SamplingState:
    """What the sampler must know of one sequence. Owned by the sequence; read by the sampler."""

    params: SamplingParams
    seed: int
    """Never None here: the request's own, or drawn from its key (blake2b)."""
    output_index: int
    """Which of the request's n outputs."""
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    """Tokens generated so far, as far as they are known here."""
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    """Ends and stops that are masked until min_tokens are out."""
    num_pending_tokens: int = 0
    """Tokens that were sampled on the device after those and are not known here yet."""

    @property
    def reads_outputs(self) -> bool:
        """True if a choice needs the values of all tokens before it, or tells more than a token:
        then no step runs ahead of it."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.logprobs is not None
        )

    @property
    def position(self) -> int:
        """Tokens sampled so far: the position in (seed, output, position)."""
        return len(self.output_token_ids) + self.num_pending_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One choice."""

    token_id: int
    logprob: float | None
    """None unless logprobs were asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest, best first."""
