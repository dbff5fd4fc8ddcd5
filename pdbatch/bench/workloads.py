"""The jobs that are measured: how many tokens go in and come out.

    A       1,024 in, 1 out                                   prefill alone
    B       512 in, 256 out                                   both, equal lengths
    C       2,048 shared and 64 own in, 64 out                a prefix that all have in common
    mixed   32 to 4,096 in, 8 to 1,024 out, log-normal        as people ask

Token ids are random, so nothing is found again but what is shared on purpose. A CPU is given a
fraction of the lengths (`Workload.scaled`), so that it ends within a minute or so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import exp
from typing import Final

CPU_SCALE: Final = 8
"""Lengths are divided by so much on a CPU."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt."""

    prompt: list[int]
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Log-normal, cut off at both ends."""

    least: int
    median: int
    most: int
    sigma: float
    """Of the logarithm."""

    def draw(self, rng: random.Random) -> int:
        """One length in tokens."""
        return min(self.most, max(self.least, round(self.median * exp(rng.gauss(0, self.sigma)))))


def always(tokens: int) -> Lengths:
    """This length every time."""
    return Lengths(least=tokens, median=tokens, most=tokens, sigma=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of job."""

    name: str
    own: Lengths
    """Tokens of a prompt that no other has."""
    out: Lengths
    shared_tokens: int = 0
    """Tokens that all prompts begin with."""

    @property
    def most_tokens(self) -> int:
        """Of the longest sequence that may come, prompt and output."""
        return self.shared_tokens + self.own.most + self.out.most

    def scaled(self, divisor: int) -> Workload:
        """With lengths divided, to no less than one token."""
        return replace(
            self,
            own=_divided(self.own, divisor),
            out=_divided(self.out, divisor),
            shared_tokens=self.shared_tokens // divisor,
        )

    def ask(self, count: int, vocab_size: int, seed: int) -> list[Asked]:
        """`count` prompts; the same for the same seed."""
        rng = random.Random(seed)
        shared = rng.choices(range(vocab_size), k=self.shared_tokens)
        asked = []
        for _ in range(count):
            own = rng.choices(range(vocab_size), k=self.own.draw(rng))
            asked.append(Asked(shared + own, self.out.draw(rng)))
        return asked


def _divided(lengths: Lengths, divisor: int) -> Lengths:
    return replace(
        lengths,
        least=max(1, lengths.least // divisor),
        median=max(1, lengths.median // divisor),
        most=max(1, lengths.most // divisor),
    )


WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        Workload(name="A", own=always(1024), out=always(1)),
        Workload(name="B", own=always(512), out=always(256)),
        Workload(name="C", own=always(64), out=always(64), shared_tokens=2048),
        Workload(
            name="mixed",
            own=Lengths(least=32, median=384, most=4096, sigma=1.0),
            out=Lengths(least=8, median=128, most=1024, sigma=0.9),
        ),
    )
}
