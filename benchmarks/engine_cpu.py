"""What the engine costs on a CPU, beside transformers' padded `generate`, in one run.

    python benchmarks/engine_cpu.py [--batch 32] [--rounds 3] [--dtype bfloat16] [--json]

Both sides run the same prompts on one thread, in turn, in this process; each figure is tokens
(prompt and output) for each second of CPU time, of the best round. Workloads:

    mixed   as many prompts as the batch, 32 to 512 tokens, 64 tokens out
    shared  64 prompts of 512 shared and 32 own tokens, 32 tokens out
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from pdbatch import LLM, SamplingParams


def mixed(batch: int, vocab: int, rng: random.Random) -> tuple[list[list[int]], int]:
    """Prompts of evenly spread lengths, in random order, and the tokens to generate."""
    lengths = [32 + round(480 * i / (batch - 1)) for i in range(batch)]
    rng.shuffle(lengths)
    return [[rng.randrange(3, vocab) for _ in range(n)] for n in lengths], 64


def shared(vocab: int, rng: random.Random) -> tuple[list[list[int]], int]:
    """64 prompts that begin with the same 512 tokens."""
    prefix = [rng.randrange(3, vocab) for _ in range(512)]
    return [prefix + [rng.randrange(3, vocab) for _ in range(32)] for _ in range(64)], 32


def run_transformers(model, prompts: list[list[int]], out: int, batch: int) -> None:
    """Left-padded batches through `generate`, greedy, exactly `out` tokens each."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for row, prompt in enumerate(part):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=out,
            max_new_tokens=out,
            pad_token_id=0,
        )


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all its threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--home", default=str(Path.home() / ".pdbatch"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)

    from transformers import AutoModelForCausalLM

    from pdbatch.engine import loader

    folder = loader.prepare(args.model, args.home)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    reference.eval()
    vocab = reference.config.vocab_size
    figures: dict[str, dict[str, float]] = {}
    for name in ("mixed", "shared"):
        ours, theirs = [], []
        for round_ in range(args.rounds):
            rng = random.Random(round_)  # other prompts each round: no prefix is left over
            prompts, out = mixed(args.batch, vocab, rng) if name == "mixed" else shared(vocab, rng)
            tokens = sum(map(len, prompts)) + out * len(prompts)
            params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
            llm = LLM(
                args.model,
                home=args.home,
                device="cpu",
                dtype=args.dtype,
                max_num_seqs=max(args.batch, 64 if name == "shared" else 0),
                threads=1,
            )
            ours.append(tokens / cpu_seconds(partial(llm.generate, prompts, params)))
            with torch.inference_mode():
                work = partial(run_transformers, reference, prompts, out, args.batch)
                theirs.append(tokens / cpu_seconds(work))
        figures[name] = {
            "pdbatch_tokens_per_cpu_s": round(max(ours), 1),
            "transformers_tokens_per_cpu_s": round(max(theirs), 1),
            "ratio": round(max(ours) / max(theirs), 2),
        }
        if not args.json:
            print(f"{name:7s} {figures[name]}", flush=True)
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
