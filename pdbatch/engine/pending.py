"""Tokens that the step before chose, put where a step's input names them.

A step is packed while the one before it still runs, so the newest token of a sequence may be on
the device alone. Its id then is -1 - r: row r of that step's choice. Order on the device's
stream makes sure that it has been chosen by the time that this reads it.
"""

from __future__ import annotations

import torch


def put_tokens(ids_T: torch.Tensor, tokens_S: torch.Tensor | None) -> None:
    """Replace each negative id in place; on the device, without a wait. None: there is none."""
    if tokens_S is not None:
        chosen_T = tokens_S[(~ids_T).clamp_(min=0)]
        ids_T.copy_(torch.where(ids_T < 0, chosen_T, ids_T))
