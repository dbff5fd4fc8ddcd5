"""One model on several devices: equal tokens, speed, hand-offs between numbers of ranks.

    python benchmarks/tensor_parallel.py tokens  [--model random:llama-3-8b:4]  [--ranks 2]
    python benchmarks/tensor_parallel.py speed   [--model random:llama-3-70b:8] [--ranks 2]
    python benchmarks/tensor_parallel.py handoff [--model random:llama-3-8b:4]  [--ranks 2]

`tokens`: greedy answers in float32, one rank against several; exits with 1 if they differ.
`speed`: workload B (512 tokens in, 256 out) in bfloat16, one rank against several, the second of
two rounds each (the first captures graphs). `handoff`: a prefill engine with one rank and a decode
engine with several, then the other way round, against one engine alone; exits with 1 unless all
was handed over and the tokens are equal. Each prints one line of JSON. `--device cpu` tries it all
out without a GPU. Every engine is a process tree of its own, so one leaves nothing to the next.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from pdbatch import LLM, SamplingParams
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.messages import (
    Adopt,
    Adoption,
    EngineRequest,
    Fatal,
    Finished,
    Prefilled,
    Pulled,
    PullFailed,
    Ready,
    Submit,
    Unpin,
)
from pdbatch.engine.random_models import config_of
from pdbatch.engine.spawn import EngineProcess
from pdbatch.request import RequestSpec

DEFAULTS = {
    "tokens": ("random:llama-3-8b:4", 24, 256, 48),
    "speed": ("random:llama-3-70b:8", 512, 512, 256),
    "handoff": ("random:llama-3-8b:4", 24, 512, 32),
}
"""Model, prompts, most tokens of a prompt, tokens of each answer."""


def main() -> None:
    args = arguments()
    report: dict[str, Any] = {"what": args.what, "model": args.model, "prompts": args.prompts}
    found = {"tokens": tokens, "speed": speed, "handoff": handoff}[args.what](args)
    print(json.dumps(report | found), flush=True)
    sys.exit(0 if found.get("equal", True) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=DEFAULTS)
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", type=int, help="speed: with so many ranks alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--input", type=int, help="tokens of a prompt, at most")
    parser.add_argument("--output", type=int, help="tokens of each answer")
    parser.add_argument("--no-graphs", action="store_true")
    args = parser.parse_args()
    names = ("model", "prompts", "input", "output")
    for name, value in zip(names, DEFAULTS[args.what], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Whether several ranks answer as one does."""
    found = [generated(args, ranks, "float32", 1) for ranks in (1, args.ranks)]
    (one, _), (several, _) = found
    return {"equal": one == several, "prefixes": common(one, several)}


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of workload B, and how many times faster several ranks are."""
    counts = [args.only] if args.only else [1, args.ranks]
    seconds = {ranks: generated(args, ranks, "bfloat16", 2)[1] for ranks in counts}
    report: dict[str, Any] = {
        str(ranks): {"s": round(took, 2), "out_tokens_s": round(args.prompts * args.output / took)}
        for ranks, took in seconds.items()
    }
    if len(counts) == 2:
        report["times"] = round(seconds[1] / seconds[args.ranks], 2)
    return report


def generated(
    args: argparse.Namespace, ranks: int, dtype: str, rounds: int
) -> tuple[list[list[int]], float]:
    """(answers, seconds) of the last of some rounds, made by a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(generate, args, ranks, dtype, rounds).result()


def generate(
    args: argparse.Namespace, ranks: int, dtype: str, rounds: int
) -> tuple[list[list[int]], float]:
    """See `generated`."""
    faulthandler.dump_traceback_later(90)  # where it hangs, if it does
    start = time.perf_counter()
    llm = LLM(
        args.model,
        device=args.device,
        dtype=dtype,
        tensor_parallel_size=ranks,
        max_num_seqs=min(512, args.prompts),
        max_num_batched_tokens=8192,
        max_model_len=args.input + args.output,
        cuda_graphs=not args.no_graphs,
    )
    print(f"{ranks} ranks, ready in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    for seed in range(rounds):
        prompts = prompts_of(args, seed)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        took = time.perf_counter() - start
        rate = args.prompts * args.output / took
        print(f"{ranks} ranks, round {seed}: {took:.2f} s, {rate:.0f} out/s", file=sys.stderr)
    llm.close()
    faulthandler.cancel_dump_traceback_later()
    return [output.outputs[0].token_ids for output in outputs], took


def handoff(args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode with different numbers of ranks, against one engine alone."""
    alone, _ = generated(args, 1, "float32", 1)
    report: dict[str, Any] = {"equal": True}
    for theirs, ours in ((1, args.ranks), (args.ranks, 1)):
        found, moved, transports = pair(args, theirs, ours)
        equal = found == alone
        report[f"{theirs}to{ours}"] = {
            "equal": equal,
            "moved_mb": round(moved / 1e6, 1),
            "by": sorted(transports),
            "prefixes": common(alone, found),
        }
        report["equal"] = report["equal"] and equal and moved > 0
    return report


def pair(args: argparse.Namespace, theirs: int, ours: int) -> tuple[list[list[int]], int, set[str]]:
    """(answers, bytes moved, by which transports) of a prefill and a decode engine.

    Raises RuntimeError if an engine fails or a pull does.
    """
    sides = [process_of(args, "prefill", theirs), process_of(args, "decode", ours)]
    prefill, decode = sides
    try:
        for side in sides:
            while not isinstance(event := side.channel.receive(), Ready):
                if isinstance(event, Fatal):
                    raise RuntimeError(f"{event.error}: {event.message}")
        params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
        requests = [
            EngineRequest(
                key=f"job:{index}",
                spec=RequestSpec(prompt_token_ids=tuple(prompt), sampling=params),
            )
            for index, prompt in enumerate(prompts_of(args, 0))
        ]
        prefill.channel.send(Submit(requests))
        answers: dict[str, list[int]] = {}
        moved, transports = 0, set[str]()
        while len(answers) < len(requests):
            for side in sides:
                match side.channel.receive(0.002):
                    case Prefilled(handoffs):
                        items = [Adoption(h.handoff_id, h.descriptor) for h in handoffs]
                        decode.channel.send(Adopt(items))
                    case Pulled(ids):
                        prefill.channel.send(Unpin(ids))
                    case PullFailed() | Fatal() as event:
                        raise RuntimeError(str(event))
                    case Finished(outputs):
                        for output in outputs:
                            answers[output.key] = output.outputs[0].token_ids
                            if output.transfer is not None:
                                moved += output.transfer.num_bytes
                                transports.add(output.transfer.transport)
        return [answers[request.key] for request in requests], moved, transports
    finally:
        for side in sides:
            side.close()


def process_of(args: argparse.Namespace, role: Any, ranks: int) -> EngineProcess:
    return EngineProcess.start(
        EngineConfig(
            model=args.model,
            home="unused",
            role=role,
            device=args.device,
            dtype="float32",
            tensor_parallel_size=ranks,
            kv_cache_bytes=4 << 30 if args.device != "cpu" else 1 << 26,
            max_num_seqs=64,
            max_num_batched_tokens=8192,
            max_model_len=args.input + args.output,
            cuda_graphs=not args.no_graphs,
            secret="benchmark",
            worker=role,
        )
    )


def prompts_of(args: argparse.Namespace, seed: int) -> list[list[int]]:
    """Random token ids; `speed` has all prompts of one length."""
    rng = random.Random(seed)
    vocab = int(config_of(args.model).vocab_size)
    least = args.input if args.what == "speed" else max(1, args.input // 8)
    lengths = [rng.randint(least, args.input) for _ in range(args.prompts)]
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def common(one: list[list[int]], other: list[list[int]]) -> str:
    """How many of all tokens come before the first difference of their answers."""
    same = 0
    for a, b in zip(one, other, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return f"{same}/{sum(map(len, one))}"


if __name__ == "__main__":
    main()
