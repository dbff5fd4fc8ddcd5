"""Jobs through the scheduler alone, with and without a look ahead at who fits; no model, no GPU.

    python benchmarks/foresight.py [--requests 3000] [--blocks 27700] [--max-num-seqs 512]

Time is reckoned, not measured: a step of Llama-3-8B on an H100 costs 22.5 us a token but at least
5 ms, its keys and values are read at 2.9 TB/s, and half a millisecond comes on top. So what differs
between the two columns is what the scheduler chose. 1,000 prompts of workload B come out at 24.9 s
(`pdbatch bench`: 24.7). Lengths are drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.blocks import BlockPool
from pdbatch.engine.scheduler import Scheduler
from pdbatch.engine.sequence import ActiveRequest
from pdbatch.sampling import SamplingParams

_EOS = frozenset({0})


class Asked(NamedTuple):
    """One request."""

    prompt: int
    most: int
    """max_tokens"""
    length: int | None = None
    """Where it ends by itself; None: never (`ignore_eos`)."""


class Outcome(NamedTuple):
    """Of one job."""

    seconds: float
    preempted: int
    steps: int


def _spread(rng: random.Random, median: int, sigma: float, most: int) -> int:
    return max(1, min(most, round(median * math.exp(rng.gauss(0, sigma)))))


JOBS: dict[str, Callable[[random.Random], Asked]] = {
    "B: 512 in, 256 out": lambda rng: Asked(512, 256),
    "128 in, 1,024 out": lambda rng: Asked(128, 1024),
    "about 8 of 1,024": lambda rng: Asked(700, 1024, _spread(rng, 8, 0.5, 1024)),
    "about 400 of 4,096": lambda rng: Asked(256, 4096, _spread(rng, 400, 0.8, 4096)),
    "about 1,500 of 8,192": lambda rng: Asked(200, 8192, _spread(rng, 1500, 0.6, 8192)),
    "700 of 2,048": lambda rng: Asked(300, 2048, 700 + rng.randrange(-30, 30)),
    "20 or 3,000 of 4,096": lambda rng: Asked(300, 4096, rng.choice([20, 3000])),
    "2,048, all cut off": lambda rng: Asked(300, 2048, 1 << 30),
}


def play(asked: Sequence[Asked], blocks: int, max_num_seqs: int, *, foresees: bool) -> Outcome:
    """A job from its first step to its last."""
    manager = BlockManager(BlockPool(blocks), 16, prefix_caching=False)
    scheduler = Scheduler(
        manager,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16_384,
        foresees=foresees,
    )
    ends: dict[int, int] = {}
    for number, one in enumerate(asked):
        is_open = one.length is not None
        ends[number] = min(one.most, one.length or one.most)
        request = ActiveRequest(
            key=str(number),
            arrival=number,
            priority=0,
            params=SamplingParams(max_tokens=one.most, ignore_eos=not is_open),
            prompt_token_ids=[1] * one.prompt,
            seed=0,
            eos_token_ids=_EOS if is_open else frozenset(),
            max_tokens=one.most,
            now_s=0.0,
        )
        scheduler.add(request.sequences[0])
    seconds, preempted, steps = 0.0, 0, 0
    while scheduler.running or scheduler.num_waiting:
        plan = scheduler.schedule()
        preempted += len(plan.preempted)
        steps += 1
        keys = sum(s.num_computed_tokens for s in plan.decodes)
        seconds += max(5e-3, 22.5e-6 * plan.num_tokens) + keys * 131_072 / 2.9e12 + 5e-4
        for sequence in plan.sequences:
            sequence.num_computed_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0
            if sequence.num_computed_tokens < sequence.num_tokens:
                continue
            sequence.output_token_ids.append(1)
            count, request = len(sequence.output_token_ids), sequence.request
            if count >= ends[request.arrival]:
                sequence.finish_reason = "stop" if count < request.max_tokens else "length"
                manager.free(sequence)
                scheduler.remove(sequence)
    return Outcome(seconds, preempted, steps)


def main(argv: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python benchmarks/foresight.py")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--blocks", type=int, default=27_700, help="of 16 tokens; 27700")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    args = parser.parse_args(argv)
    columns = f"{'preempted':>9}  {'steps':>6}    "
    print(f"{'job':22}  {'blind':>8}  {columns}{'foresees':>8}  {columns}")
    for name, draw in JOBS.items():
        rng = random.Random(1)
        asked = [draw(rng) for _ in range(args.requests)]
        blind, seeing = (
            play(asked, args.blocks, args.max_num_seqs, foresees=foresees)
            for foresees in (False, True)
        )
        print(
            f"{name:22}  {blind.seconds:6.1f} s  {blind.preempted:9}  {blind.steps:6}    "
            f"{seeing.seconds:6.1f} s  {seeing.preempted:9}  {seeing.steps:6}    "
            f"{blind.seconds / seeing.seconds:.3f} times",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
