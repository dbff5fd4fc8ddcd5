"""From the scheduler's choice to the runner's input: packing, nothing decided.

Legend: S sequences of the step, R the decodes among them (they come first), T tokens, M most
blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pdbatch.engine.blocks import BlockId
from pdbatch.engine.model_input import ModelInput
from pdbatch.engine.sequence import Sequence

Longs = npt.NDArray[np.int64]


class Packer:
    """Packs one step after the other; keeps the block tables of the last one."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables = PackedTables()

    def pack(
        self, sequences: SequenceOf[Sequence], num_decodes: int, tokens_before: Any = None
    ) -> ModelInput:
        """The scheduled tokens of `sequences`, of which the first `num_decodes` are decodes.

        `tokens_before` are those of the step in flight: pending tokens name their row there.
        """
        tables_SM = self._tables.pack(sequences)
        decodes, chunks = sequences[:num_decodes], sequences[num_decodes:]
        ids = [_next_id(sequence) for sequence in decodes]
        pending = bool(ids) and min(ids) < 0
        positions = [sequence.num_computed_tokens for sequence in decodes]
        context_lens = [position + 1 for position in positions]
        wanted = list(range(num_decodes))
        offsets = list(range(num_decodes + 1))
        for at, sequence in enumerate(chunks, num_decodes):
            start = sequence.num_computed_tokens
            stop = start + sequence.num_scheduled_tokens
            ids.extend(sequence.tokens(start, stop))
            positions.extend(range(start, stop))
            offsets.append(len(ids))
            context_lens.append(stop)
            if stop == sequence.num_tokens:
                wanted.append(at)
        positions_T = np.array(positions, dtype=np.int64)
        slots_T = self._slots(tables_SM, positions_T, offsets, num_decodes)
        return ModelInput(
            input_ids_T=torch.from_numpy(np.array(ids, dtype=np.int64)),
            positions_T=torch.from_numpy(positions_T),
            slot_mapping_T=torch.from_numpy(slots_T),
            cu_seqlens_q=offsets,
            context_lens=context_lens,
            block_tables_SM=torch.from_numpy(tables_SM),
            logits_indices=wanted,
            num_decodes=num_decodes,
            tokens_before=tokens_before if pending else None,
        )

    def _slots(
        self,
        tables_SM: npt.NDArray[np.int32],
        positions_T: Longs,
        offsets: list[int],
        num_decodes: int,
    ) -> Longs:
        """Where each token is written."""
        rows_T = np.arange(len(positions_T))
        if num_decodes < len(offsets) - 1:
            rows_T = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        block_T, offset_T = np.divmod(positions_T, self._block_size)
        slots: Longs = tables_SM[rows_T, block_T].astype(np.int64) * self._block_size + offset_T
        return slots


class PackedTables:
    """Block tables as a matrix. What was packed for the last step is not packed again.

    A table that was there and is the same list can only have grown since.
    """

    def __init__(self) -> None:
        self._packed: list[list[BlockId]] = []
        self._lens: list[int] = []
        self._tables_SM = np.zeros((1, 1), dtype=np.int32)

    def pack(self, sequences: SequenceOf[Sequence]) -> npt.NDArray[np.int32]:
        """[S, M], padded with 0."""
        known, lens = self._packed, self._lens
        tables = [sequence.block_table for sequence in sequences]
        now = [len(table) for table in tables]
        was = [0] * len(tables)
        news: list[tuple[int, int]] = []
        for row, (sequence, table) in enumerate(zip(sequences, tables, strict=True)):
            before = sequence.table_row
            sequence.table_row = row
            if before < len(known) and known[before] is table:
                was[row] = before
                if lens[before] != now[row]:
                    news.append((row, lens[before]))
            else:
                news.append((row, 0))
        tables_SM = self._gathered(was, max(now))
        for row, first in news:
            table = tables[row]
            tables_SM[row, first : len(table)] = table[first:]
            if not first:
                tables_SM[row, len(table) :] = 0
        self._packed, self._lens, self._tables_SM = tables, now, tables_SM
        return tables_SM

    def _gathered(self, rows: list[int], width: int) -> npt.NDArray[np.int32]:
        """These rows of the last step, in a matrix of `width` columns."""
        both = min(width, self._tables_SM.shape[1])
        tables_SM = np.zeros((len(rows), width), dtype=np.int32)
        tables_SM[:, :both] = self._tables_SM[rows, :both]
        return tables_SM


def _next_id(sequence: Sequence) -> int:
    """The token that a decode runs, or the row of the step in flight that chooses it."""
    start = sequence.num_computed_tokens
    at = start - sequence.num_prompt_tokens
    if at < 0:
        return sequence.prompt_token_ids[start]
    outputs = sequence.output_token_ids
    return outputs[at] if at < len(outputs) else -1 - sequence.pending_row
