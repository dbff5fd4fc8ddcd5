"""One step's numbers on the device, made once a step and read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pdbatch.engine.attention.equal import EqualPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTables:
    """Work items of the decodes for layers of one kind."""

    items_I4: torch.Tensor
    row_parts: torch.Tensor
    num_parts: int
    """Places for partial results of items; 0 if no row is split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTables:
    """Families of decodes; see `work.Shared`."""

    tiles_F2: torch.Tensor
    members: torch.Tensor
    shared_at: torch.Tensor
    """[R] first of a row's partial results of the shared part, -1 without one."""
    splits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """One step's numbers, int32 on the device."""

    num_decodes: int
    """Rows that decode, padding included."""
    slots: torch.Tensor
    """[T]; negative where nothing is written."""
    starts: torch.Tensor
    """[S + 1] offsets into T."""
    lens: torch.Tensor
    """[S] keys of each sequence, this step's included."""
    blocks: torch.Tensor
    """All block tables, one after the other."""
    blocks_at: torch.Tensor
    """[S] where each sequence's blocks begin in `blocks`."""
    own: DecodeTables | None = None
    """The decodes' keys; without those that a family reads."""
    whole: DecodeTables | None = None
    """All keys of the decodes, for layers with a window; None: as `own`."""
    shared: SharedTables | None = None
    tiles_X2: torch.Tensor | None = None
    """Tiles of chunks for the paged kernel."""
    runs: list[Run] = field(default_factory=list)
    """Chunks for `varlen_attn` or cuDNN; their tiles are in `run_tiles_X2` too."""
    run_tiles_X2: torch.Tensor | None = None
    tile_rows: int = 0
    """Rows of those tiles: tokens times the query heads of a group."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring chunks that attend to nothing but themselves."""

    start: int
    end: int
    """Tokens [start, end) of the step."""
    cu_seqlens: torch.Tensor
    """Their offsets, from 0."""
    longest: int
    equal: EqualPrompts | None = None
    """Takes them as a batch: all are `longest` tokens long."""
