"""The engine on one GPU: three workloads through `LLM`, with a model of random weights.

    python benchmarks/engine_gpu.py [A B C] [-n 1000] [--rounds 3] [--stages] [--json FILE]

Llama-3-8B's shape, bf16, made on the device; random token ids, greedy, `ignore_eos`, no
tokenizer. `--layers` makes a smaller model, to try things out. Workloads:

    A  1,024 tokens in, 1 out
    B  512 in, 256 out
    C  2,048 shared and 64 own in, 64 out

Each round has prompts of its own, so that nothing is found from the one before; the first one
also captures graphs, so medians of three leave it out. `--stages` waits for the device after each
stage, which tells where time goes and costs a little of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pdbatch import LLM, SamplingParams
from pdbatch.engine.attention import hook
from pdbatch.engine.loader import LoadedModel
from pdbatch.engine.tokenizer import Tokenizer

FLOORS_S = {"A": 18.2, "B": 17.6, "C": 2.5}
"""Of 1,000 prompts on an H100: products at 800 TFLOP/s, weights and KV at 3.35 TB/s."""
VOCAB = 128_256


def random_llama(layers: int, device: str = "cuda:0") -> LoadedModel:
    """Llama-3-8B's shape with random weights, in memory alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hook.register()
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCAB,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=hook.IMPLEMENTATION
        )
    model.requires_grad_(False)
    return LoadedModel(
        model=model.eval(),
        config=config,
        tokenizer=Tokenizer(None, VOCAB),
        dtype=torch.bfloat16,
        device=torch.device(device),
        max_model_len=8192,
        eos_token_ids=(2,),
        name="random-llama-8b",
        vocab_size=VOCAB,
    )


def prompts_of(kind: str, count: int, rng: random.Random) -> tuple[list[list[int]], int]:
    """Prompts of a workload and how many tokens each answer has."""
    shared = [rng.randrange(VOCAB) for _ in range(2048)] if kind == "C" else []
    own, out = {"A": (1024, 1), "B": (512, 256), "C": (64, 64)}[kind]
    return [shared + [rng.randrange(VOCAB) for _ in range(own)] for _ in range(count)], out


class Stages:
    """Seconds by stage, noted around the engine's own functions."""

    def __init__(self, llm: LLM) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        engine: Any = llm.engine
        side = engine._stepper._model
        side.runner.execute = self._timed(side.runner.execute, "model", wait=True)
        side.sampler.choose = self._timed(side.sampler.choose, "sampling")
        engine.scheduler.schedule = self._timed(engine.scheduler.schedule, "scheduling")
        engine._life.advance = self._timed(engine._life.advance, "advancing")
        packer: Any = engine._stepper._packer
        packer.pack = self._timed(packer.pack, "input")

    def _timed(self, function: Callable[..., Any], stage: str, wait: bool = False) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if wait:
                torch.cuda.synchronize()
            self.seconds[stage] += time.perf_counter() - start
            self.steps += stage == "model"
            return result

        return timed


def run(llm: LLM, kind: str, count: int, seed: int, stages: Stages | None) -> dict[str, Any]:
    """One round; its figures."""
    prompts, out = prompts_of(kind, count, random.Random(seed))
    params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
    if stages is not None:
        stages.seconds.clear()
        stages.steps = 0
    torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == out for output in outputs)
    tokens_in, tokens_out = sum(map(len, prompts)), out * count
    figures: dict[str, Any] = {
        "workload": kind,
        "seconds": round(seconds, 2),
        "in_tok_s": round(tokens_in / seconds),
        "out_tok_s": round(tokens_out / seconds),
        "floor": round(FLOORS_S[kind] * count / 1000 / seconds, 3),
    }
    if stages is not None:
        figures["steps"] = stages.steps
        spent = {name: round(value, 2) for name, value in sorted(stages.seconds.items())}
        figures["stages"] = {**spent, "rest": round(seconds - sum(stages.seconds.values()), 2)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=[])
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    start = time.perf_counter()
    llm = LLM(
        random_llama(args.layers),
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=4096,
        cuda_graphs=not args.no_graphs,
    )
    print(f"ready after {time.perf_counter() - start:.1f} s", flush=True)
    stages = Stages(llm) if args.stages else None
    results = []
    for kind in args.workloads or ["A", "B", "C"]:
        run(llm, kind, 24, -1, stages)  # compiles what the workload needs
        seconds = []
        for round_ in range(args.rounds):
            figures = run(llm, kind, args.n, round_, stages)
            results.append(figures)
            seconds.append(figures["seconds"])
            print(json.dumps(figures), flush=True)
        if len(seconds) > 1:
            print(f"{kind}: median {statistics.median(seconds[1:]):.2f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
