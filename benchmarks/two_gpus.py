"""The whole path on two GPUs of one machine, against one GPU that does everything.

    python benchmarks/two_gpus.py [--dtype float32] [--requests 300] [--devices cuda:0,cuda:1]

`pdbatch run` twice over the same prompts (512 to 2,048 tokens, some with a shared beginning): with
prefill on the first device and decode on the second, KV by `cuda_ipc`; then with one mixed worker
on the first. All is real: embedded Redis, reconciler, Celery workers, SQLite, a random Llama of
about a billion parameters. Prints one JSON object and exits with 1 unless

    every request succeeded, and every one that was handed over came by the transport asked for;
    the transfers took less than --most-share of the engines' time;
    the outputs are equal token by token, up to ties.

A tie: batches of other sizes add in another order, so where the two likeliest tokens are as close
as rounding (log-probabilities less than --tie apart in both runs), greedy decoding may take either;
what follows is another text and is not compared. float32 makes ties rare, so that is the dtype for
the comparison; in bfloat16 a random model has one in nearly every text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from fleet import fresh_home

from pdbatch.client import Client
from pdbatch.config import Settings
from pdbatch.request import PositionLogprobs, RequestOutput

STAGES = ("queued_s", "prefill_s", "handoff_s", "transfer_s", "decode_s", "engine_s")
SHARED = 256
"""Tokens with which every fourth prompt begins."""


def main() -> None:
    args = arguments()
    if args.make_model:
        make_model(args)
        return
    home = fresh_home(args.home)
    folder = home / f"llama-{args.layers}x{args.hidden}"
    start = time.monotonic()
    if not (folder / "config.json").exists():  # in a process of its own: it must leave the device
        command = [sys.executable, __file__, *sys.argv[1:], "--make-model", str(folder)]
        subprocess.run(command, check=True, timeout=args.timeout)
    report: dict[str, Any] = {
        "model": {name: getattr(args, name) for name in ("layers", "hidden", "heads", "kv_heads")},
        "dtype": args.dtype,
        "devices": args.devices,
        "transport": args.transport,
        "requests": args.requests,
        "make_model_s": round(time.monotonic() - start, 1),
    }
    prompts = home / "prompts.jsonl"
    report["prompt_tokens"] = write_prompts(args, prompts)
    outputs: dict[str, dict[int, RequestOutput]] = {}
    options = {
        "two": ["--prefill", "1", "--decode", "1", "--device", args.devices],
        "one": ["--prefill", "1", "--decode", "0", "--device", args.devices.split(",")[0]],
    }
    for name in ["two"] if args.no_comparison else ["two", "one"]:
        try:
            place = home / f"{name}-{args.dtype}"
            report[name], outputs[name] = run(args, place, folder, prompts, options[name])
        except Exception as error:  # the other part's figures are still worth printing
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    if len(outputs) == 2:
        report["equal"] = compare(outputs["two"], outputs["one"], args.tie)
    report["problems"] = problems(args, report)
    print(json.dumps(report, indent=2))
    sys.exit(1 if report["problems"] else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--shortest", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="of prefill and of decode")
    parser.add_argument("--transport", default="cuda_ipc")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--kv-cache-bytes", default="32GiB", help="of each engine")
    parser.add_argument("--tie", type=float, default=1e-3)
    parser.add_argument("--most-share", type=float, default=0.03)
    parser.add_argument("--no-comparison", action="store_true", help="two GPUs alone")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds of one run")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> None:
    """A random Llama whose answers wander, in bfloat16, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2 * args.longest,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(20)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.devices.split(",")[0]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0.0, 1.0)
            elif weight.dim() > 1:  # so that each layer adds as much as there was
                sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0.0, sharp * weight.shape[1] ** -0.5)
    partial = args.make_model.with_name(args.make_model.name + ".partial")
    model.save_pretrained(partial)
    partial.rename(args.make_model)


def write_prompts(args: argparse.Namespace, path: Path) -> int:
    """The same prompts at every call; how many tokens they have."""
    rng = random.Random(3)
    beginnings = [[rng.randrange(3, args.vocab) for _ in range(SHARED)] for _ in range(4)]
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for index in range(args.requests):
            length = rng.randint(args.shortest, args.longest)
            shared = beginnings[index // 4 % 4][: length // 2] if index % 4 == 0 else []
            prompt = shared + [rng.randrange(3, args.vocab) for _ in range(length - len(shared))]
            line = {
                "id": f"r-{index}",
                "prompt": prompt,
                "max_tokens": args.output,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 2,
            }
            file.write(json.dumps(line) + "\n")
            total += length
    return total


def run(
    args: argparse.Namespace, home: Path, folder: Path, prompts: Path, options: list[str]
) -> tuple[dict[str, Any], dict[int, RequestOutput]]:
    """One `pdbatch run`; its figures, and the outputs by the prompts' places."""
    settings = Settings.load(
        {
            "home": str(home),
            "model": str(folder),
            "dtype": args.dtype,
            "kv_transport": args.transport,
            "kv_cache_bytes": args.kv_cache_bytes,
            "claim_bytes": "8GiB",
            "shard_size": 32,
        },
        env={},
    )
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pdbatch.cli", "run", str(prompts), *options]
    command += ["--output", str(home / "results.jsonl"), "--model", str(folder), "--json"]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **settings.to_env()},
            capture_output=True,
            text=True,
            timeout=args.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end within {args.timeout} s\n{tails(home)}") from None
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}\n{done.stderr[-2000:]}\n{tails(home)}")
    took_s = time.monotonic() - start
    document = json.loads(done.stdout)
    with Client(settings) as client:
        outputs = {result.index: result.output for result in client.results(document["id"])}
    return figures(document, outputs, took_s), outputs


def figures(
    document: dict[str, Any], outputs: dict[int, RequestOutput], took_s: float
) -> dict[str, Any]:
    """What one run was like: the job's summary, and over its requests."""
    moved = [(o.transfer, o.times.transfer_s) for o in outputs.values() if o.transfer is not None]
    found: dict[str, Any] = {
        "with_start_s": round(took_s, 1),
        "elapsed_s": round(document["elapsed_s"], 2),
        "counts": document["counts"],
        "tokens": document["tokens"],
        "job_summary": {
            "stages_s": document["stages_s"],
            "engine_s": document["engine_s"],
            "transfer": document["transfer"],
        },
        "mean_s": {
            stage: fmean(getattr(output.times, stage) for output in outputs.values())
            for stage in STAGES
        },
        "transports": dict(Counter(transfer.transport for transfer, _ in moved)),
    }
    if len(moved) > 1:
        found["pull_ms"] = spread([1e3 * seconds for _, seconds in moved])
        found["pull_mb"] = spread([transfer.num_bytes / 1e6 for transfer, _ in moved])
        speeds = [transfer.num_bytes / seconds / 1e9 for transfer, seconds in moved]
        found["pull_gb_per_s"] = spread(speeds)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Of many numbers: least, median, 95%, greatest."""
    cuts = quantiles(values, n=20, method="inclusive")
    named = {"min": min(values), "median": cuts[9], "p95": cuts[18], "max": max(values)}
    return {name: round(value, 3) for name, value in named.items()}


def compare(
    two: dict[int, RequestOutput], one: dict[int, RequestOutput], tie: float
) -> dict[str, Any]:
    """How many outputs are equal, how many part at a tie, and those that simply differ."""
    equal = 0
    ties: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for index in sorted(two.keys() & one.keys()):
        a, b = (outputs[index].outputs[0] for outputs in (two, one))
        pairs = zip(a.token_ids, b.token_ids, strict=True)
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is None:
            equal += 1
            continue
        gaps = [
            gap(output.logprobs[at] if output.logprobs else None, a.token_ids[at], b.token_ids[at])
            for output in (a, b)
        ]
        parting = {"request": index, "token": at, "gaps": gaps}
        (ties if all(g is not None and g < tie for g in gaps) else wrong).append(parting)
    return {
        "requests": len(two.keys() & one.keys()),
        "equal": equal,
        "parted_at_a_tie": len(ties),
        "ties": ties[:10],
        "differ": len(wrong),
        "differing": wrong[:10],
    }


def gap(position: PositionLogprobs | None, x: int, y: int) -> float | None:
    """How far apart two tokens are at one position; None if one is not among the likeliest."""
    if position is None:
        return None
    known = {token.token_id: token.logprob for token in (*position.top, position.chosen)}
    return abs(known[x] - known[y]) if x in known and y in known else None


def problems(args: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    """What does not hold."""
    found = []
    for name in ("two", "one"):
        part = report.get(name)
        if part is None:
            continue
        if "error" in part:
            found.append(f"{name}: {part['error'].splitlines()[0]}")
        elif part["counts"]["succeeded"] != args.requests:
            found.append(f"{name}: {part['counts']}")
    if "error" not in report["two"]:
        share = report["two"]["job_summary"]["transfer"]["share_of_engine_time"]
        if share is None or share >= args.most_share:
            found.append(f"the transfers took {share} of the engines' time")
        if set(report["two"]["transports"]) != {args.transport}:
            found.append(f"transports: {report['two']['transports']}")
    if "equal" in report and report["equal"]["differ"]:
        found.append(f"{report['equal']['differ']} outputs differ")
    return found


def tails(home: Path, lines: int = 12) -> str:
    """The last lines of the logs."""
    parts = []
    for path in sorted((home / "logs").glob("*.log")):
        end = path.read_text(errors="replace").splitlines()[-lines:]
        parts.append(f"--- {path.name}\n" + "\n".join(end))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
