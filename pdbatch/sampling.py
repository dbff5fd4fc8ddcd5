"""How the next token is chosen, and when a sequence ends."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling of one request, checked when built.

    Raises ValueError whose text begins with the name of the field. Names and
    meanings are those of the OpenAI API and of open-source servers.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None means up to the model's length."""
    min_tokens: int = 0
    """No stop token or stop string ends the sequence before so many tokens."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    n: int = 1
    """Outputs for one prompt."""
    seed: int | None = None
    """Random numbers are keyed by (seed, output, position); None: drawn from the request's key."""
    stop: tuple[str, ...] = ()
    """Strings that end a sequence; not part of the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence, beside the model's own."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = None
    """None: no log-probabilities; k: those of the chosen token and of the k likeliest."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    """Added to the logits of these tokens, -100 to 100."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError("repetition_penalty must be above 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens")
        if any(not s for s in self.stop):
            raise ValueError("stop holds an empty string")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias values must be between -100 and 100")

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature < 1e-5


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("temperature", 0, 100),
    ("top_k", -1, 2**31 - 1),
    ("min_p", 0, 1),
    ("n", 1, 128),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, 20),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
)
