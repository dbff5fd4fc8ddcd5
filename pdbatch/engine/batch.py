"""From the scheduler's choice to the runner's input: packing, nothing decided."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.sequence import Sequence


def build_input(sequences: SequenceOf[Sequence], num_decodes: int, block_size: int) -> ModelInput:
    """Pack the scheduled tokens of `sequences`, of which the first `num_decodes` are decodes."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    offsets, context_lens, wanted = [0], [], []
    for at, sequence in enumerate(sequences):
        start = sequence.num_computed_tokens
        stop = start + sequence.num_scheduled_tokens
        table = sequence.block_table
        if stop - start == 1:
            slots.append(table[start // block_size] * block_size + start % block_size)
            positions.append(start)
        else:
            slots.extend(_slots(table, start, stop, block_size))
            positions.extend(range(start, stop))
        input_ids.extend(sequence.tokens(start, stop))
        offsets.append(len(input_ids))
        context_lens.append(stop)
        if stop == sequence.num_tokens:
            wanted.append(at)
    return ModelInput(
        input_ids_T=torch.tensor(input_ids, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        slot_mapping_T=torch.tensor(slots, dtype=torch.int64),
        cu_seqlens_q=offsets,
        context_lens=context_lens,
        block_tables_SM=_tables(sequences),
        logits_indices=wanted,
        num_decodes=num_decodes,
    )


def _slots(table: SequenceOf[int], start: int, stop: int, block_size: int) -> list[int]:
    """Where tokens [start, stop) of a sequence are written."""
    first, last = start // block_size, -(-stop // block_size)
    slots: list[int] = []
    for block in table[first:last]:
        slots.extend(range(block * block_size, (block + 1) * block_size))
    skipped = start - first * block_size
    return slots[skipped : skipped + stop - start]


def _tables(sequences: SequenceOf[Sequence]) -> torch.Tensor:
    width = max(len(sequence.block_table) for sequence in sequences)
    tables = np.zeros((len(sequences), width), dtype=np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    return torch.from_numpy(tables)
