"""What the scheduling side hands to the model side for one step, and what comes back.

Legend: T scheduled tokens of all sequences, S scheduled sequences, V vocabulary,
M most blocks of one sequence in this step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdbatch.sampling import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """One step's batch, packed: sequence after sequence, no padding between them.

    Lists and tensors alike are in the scheduler's order: decodes (one token each) first.
    """

    input_ids_T: torch.Tensor
    """int64, CPU. Token ids to run."""
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
    """Tokens generated so far; its length is the position in (seed, output, position)."""
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    """Ends and stops that are masked until min_tokens are out."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One choice."""

    token_id: int
    logprob: float | None
    """None unless logprobs were asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest, best first."""
