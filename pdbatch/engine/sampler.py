"""Chooses the next token of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdbatch.engine.model_input import SampledToken, SamplingState


class Sampler:
    """Chooses tokens for a batch; no row depends on its batch mates."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        raise NotImplementedError

    def sample(
        self, logits_SV: torch.Tensor, states: Sequence[SamplingState]
    ) -> list[SampledToken]:
        """One token for each row; row s belongs to states[s]. States are not changed."""
        raise NotImplementedError
