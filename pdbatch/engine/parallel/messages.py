"""What rank 0 tells the other ranks, and what they answer.

A `Pin` is answered by `Pinned`; a `Pull` by `PullEnded`, whenever it ends; nothing else is
answered. All is done in the order in which it was sent.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.model_input import ModelInput


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message: what to be."""

    config: EngineConfig
    """`device` is the rank's own."""
    rank: int
    meeting: str
    """File at which the ranks meet."""


class Step(msgspec.Struct, tag=True, frozen=True):
    """A `ModelInput`; tensors as bytes."""

    input_ids_T: bytes
    positions_T: bytes
    slot_mapping_T: bytes
    cu_seqlens_q: list[int]
    context_lens: list[int]
    block_tables_SM: bytes
    logits_indices: list[int]
    num_decodes: int
    tokens_before: tuple[str, int] | None
    """dtype and number of the tokens of the step before, which rank 0 then broadcasts."""


class CopyBlocks(msgspec.Struct, tag=True, frozen=True):
    """As `Cache.copy_blocks`."""

    src: list[int]
    dst: list[int]


class Taken(msgspec.Struct, tag=True, frozen=True):
    """These blocks get other content from now on."""

    blocks: list[int]


class Pin(msgspec.Struct, tag=True, frozen=True):
    """Offer this rank's part of a prompt's blocks."""

    handoff_id: str
    blocks: list[int]
    prompt: list[int]


class Unpin(msgspec.Struct, tag=True, frozen=True):
    """Stop offering."""

    handoff_id: str


class Pull(msgspec.Struct, tag=True, frozen=True):
    """Read this rank's part of a hand-off into `blocks`; the first `skip` have it already."""

    handoff_id: str
    descriptor: bytes
    blocks: list[int]
    skip: int


class NewLife(msgspec.Struct, tag=True, frozen=True):
    """As `Transfers.reset`."""

    epoch: int


class End(msgspec.Struct, tag=True, frozen=True):
    """Finish what is under way and end."""


class Up(msgspec.Struct, tag=True, frozen=True):
    """The rank is there to meet the others; said again: it is ready for steps."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The rank ends; why."""

    kind: str
    message: str


class Pinned(msgspec.Struct, tag=True, frozen=True):
    """This rank's descriptor."""

    descriptor: bytes


class PullEnded(msgspec.Struct, tag=True, frozen=True):
    """A `PullResult`."""

    handoff_id: str
    num_bytes: int
    seconds: float
    transport: str
    code: str | None
    message: str


Order = Step | CopyBlocks | Taken | Pin | Unpin | Pull | NewLife | End
Answer = Up | Failed | Pinned | PullEnded


def step_of(batch: ModelInput) -> Step:
    """A step's input on its way."""
    before = batch.tokens_before
    return Step(
        input_ids_T=batch.input_ids_T.numpy().tobytes(),
        positions_T=batch.positions_T.numpy().tobytes(),
        slot_mapping_T=batch.slot_mapping_T.numpy().tobytes(),
        cu_seqlens_q=batch.cu_seqlens_q,
        context_lens=batch.context_lens,
        block_tables_SM=batch.block_tables_SM.contiguous().numpy().tobytes(),
        logits_indices=batch.logits_indices,
        num_decodes=batch.num_decodes,
        tokens_before=None if before is None else (_name(before.dtype), before.numel()),
    )


def input_of(step: Step, tokens_before: torch.Tensor | None) -> ModelInput:
    """A step's input as it was."""
    return ModelInput(
        input_ids_T=_longs(step.input_ids_T),
        positions_T=_longs(step.positions_T),
        slot_mapping_T=_longs(step.slot_mapping_T),
        cu_seqlens_q=step.cu_seqlens_q,
        context_lens=step.context_lens,
        block_tables_SM=torch.from_numpy(
            np.frombuffer(step.block_tables_SM, dtype=np.int32)
            .reshape(len(step.context_lens), -1)
            .copy()
        ),
        logits_indices=step.logits_indices,
        num_decodes=step.num_decodes,
        tokens_before=tokens_before,
    )


def empty_tokens(step: Step, device: torch.device) -> torch.Tensor | None:
    """Room for the tokens of the step before, if it needs them."""
    if step.tokens_before is None:
        return None
    dtype, count = step.tokens_before
    return torch.empty(count, dtype=getattr(torch, dtype), device=device)


def _longs(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.int64).copy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
