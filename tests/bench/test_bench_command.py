"""`pdbatch bench`: the floors of the notes, honest rounds, a trace that Perfetto reads."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import Ernie4_5_MoeConfig

from pdbatch.bench.floor import Rates, cost_of, floor_s
from pdbatch.bench.kernels import gpu_events
from pdbatch.bench.subject import Subject
from pdbatch.bench.workloads import WORKLOADS, Asked
from pdbatch.cli.app import cli
from pdbatch.engine.random_models import config_of
from pdbatch.errors import UsageError

torch.set_num_threads(1)
H100 = Rates(flop_s=800e12, bytes_s=3.35e12)


def check_trace(events: Any) -> None:
    """What Chrome's format asks of each kind of event."""
    assert isinstance(events, list) and events
    for event in events:
        assert isinstance(event["pid"], int) and isinstance(event["name"], str)
        assert event["ph"] in "XCMi", event
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
            continue
        assert event["ts"] > 1.7e15, "microseconds since 1970"
        if event["ph"] == "X":
            assert event["dur"] >= 0 and isinstance(event["tid"], int)
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())


@pytest.mark.parametrize(("name", "seconds"), [("A", 18.2), ("B", 17.6), ("C", 2.5)])
def test_the_floors_of_llama_3_8b_on_an_h100(name: str, seconds: float) -> None:
    workload = WORKLOADS[name]
    asked = workload.ask(1000, 128_256, 0)
    cost = cost_of(config_of("random:llama-3-8b"), torch.bfloat16)
    assert cost.kv_bytes == 131_072 and cost.step_bytes == pytest.approx(15.0e9, rel=0.01)
    found = floor_s(asked, workload.shared_tokens, 512, cost, H100)
    assert found == pytest.approx(seconds, abs=0.05)


def test_experts_cost_what_a_token_meets_and_are_read_all() -> None:
    cost = cost_of(config_of("random:qwen3-30b-a3b"), torch.bfloat16)
    assert cost.body_weights + cost.head_weights == pytest.approx(3.0e9, rel=0.1)
    assert cost.step_bytes / 2 == pytest.approx(30.2e9, rel=0.02)


def test_experts_that_every_token_meets_are_counted() -> None:
    config = Ernie4_5_MoeConfig()
    cost = cost_of(config, torch.bfloat16)
    config.moe_num_shared_experts = 0
    without = cost_of(config, torch.bfloat16)
    shared = config.num_hidden_layers * 2 * 3 * config.hidden_size * config.moe_intermediate_size
    assert cost.body_weights - without.body_weights == shared
    assert cost.step_bytes - without.step_bytes == 2 * shared


def test_the_floor_at_the_lasting_rate_is_the_longer_one() -> None:
    assert H100.lasting is None
    hot = dataclasses.replace(H100, lasting_flop_s=600e12)
    assert hot.lasting is not None and hot.lasting.flop_s == 600e12
    cost = cost_of(config_of("random:llama-3-8b"), torch.bfloat16)
    asked = WORKLOADS["A"].ask(10, 128_256, 0)
    ratio = floor_s(asked, 0, 512, cost, hot.lasting) / floor_s(asked, 0, 512, cost, hot)
    assert ratio == pytest.approx(800 / 600)


def test_narrow_weights_are_fewer_bytes() -> None:
    cost = cost_of(config_of("random:llama-3-8b"), torch.bfloat16, "wint4")
    assert cost.step_bytes == pytest.approx(6.98e9 * 4.25 / 8 + 0.525e9, rel=1e-3)


def test_a_floor_counts_every_token_once_by_hand() -> None:
    cost = cost_of(config_of("random:tiny"), torch.float32)
    slow = Rates(flop_s=1.0, bytes_s=1e30)
    asked = [Asked([1, 2, 3, 4], 3), Asked([1, 2, 7], 1)]  # two tokens in common
    pairs = (1 + 2) + (3 + 4) + 3  # shared once, own tokens see all before them
    prefill = 2 * cost.body_weights * 5 + cost.pair_flop * pairs + 2 * cost.head_weights * 2
    seen = 5 + 6  # by the two decoded tokens
    decode = 2 * (cost.body_weights + cost.head_weights) * 2 + cost.pair_flop * seen
    assert floor_s(asked, 2, 512, cost, slow) == pytest.approx(prefill + decode)
    narrow = Rates(flop_s=1e30, bytes_s=1.0)
    moved = 2 * cost.step_bytes + cost.kv_bytes * (2 * 2 + 3 + 4)
    assert floor_s(asked, 2, 512, cost, narrow) == pytest.approx(moved)


def test_prompts_come_from_their_seed_within_their_limits() -> None:
    mixed = WORKLOADS["mixed"]
    asked = mixed.ask(400, 1000, 5)
    assert asked == mixed.ask(400, 1000, 5) != mixed.ask(400, 1000, 6)
    lengths = [len(one.prompt) for one in asked]
    assert min(lengths) >= 32 and max(lengths) <= 4096 and len(set(lengths)) > 100
    assert all(8 <= one.num_output_tokens <= 1024 for one in asked)
    shared = WORKLOADS["C"].scaled(8).ask(3, 1000, 0)
    assert len({tuple(one.prompt[:256]) for one in shared}) == 1
    assert len({tuple(one.prompt[256:]) for one in shared}) == 3 and len(shared[0].prompt) == 264


def test_the_command_measures_and_traces(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, "-m", "pdbatch.cli", "bench", "--model", "random:tiny", "-n", "4"]
    command += ["--workload", "A,B,C", "--rounds", "2", "--seed", "7", "--trace", str(trace)]
    command += ["--json", "--stages", "--device", "cpu", "--home", str(tmp_path / "home")]
    command += ["--max-num-seqs", "3", "--set", "worker_threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "A     4 prompts (seed 7)" in done.stderr and "B     4 prompts (seed 8)" in done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == "random:tiny" and report["max_num_seqs"] == 3
    assert [one["workload"] for one in report["rounds"]] == ["A", "A", "B", "B", "C", "C"]
    for one in report["rounds"]:
        assert 0 < one["floor_s"] < one["seconds"] and one["steps"] >= 2
        assert sum(one["stages_s"].values()) == pytest.approx(one["seconds"], abs=0.01)
        assert {"schedule", "launch", "sample", "advance", "step", "rest"} <= one["stages_s"].keys()
    assert report["rounds"][0]["prompt_tokens"] == 4 * 128
    assert report["rounds"][2]["output_tokens"] == 4 * 32
    events = json.loads(trace.read_text())
    check_trace(events)
    spans = Counter(event["name"] for event in events if event["ph"] == "X")
    assert spans["workload A"] == spans["workload B"] == spans["workload C"] == 1
    counted = [e for e in events if e["ph"] == "C" and e["name"] == "sequences in the step"]
    assert spans["schedule"] == spans["step"] == len(counted), "each told once"
    assert max(event["args"]["decodes"] for event in counted) == 3


def test_two_ranks_are_measured_as_one_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdbatch.cli", "bench", "--model", "random:tiny", "-n", "3"]
    command += ["--workload", "C", "--tensor-parallel-size", "2", "--device", "cpu", "--json"]
    command += ["--home", str(tmp_path / "home"), "--set", "worker_threads=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tensor_parallel_size"] == 2 and report["device"] == "cpu"
    (one,) = report["rounds"]
    assert one["output_tokens"] == 3 * 8 and 0 < one["floor_s"] < one["seconds"]


def test_the_floor_of_several_devices_is_that_of_their_rates_together() -> None:
    shared = Subject(
        name="random:tiny",
        config=config_of("random:tiny"),
        dtype=torch.bfloat16,
        device=torch.device("cuda:0"),
        num_ranks=4,
        max_model_len=8192,
        vocab_size=512,
        loaded=None,
    )
    assert shared.all_rates(H100) == Rates(flop_s=4 * 800e12, bytes_s=4 * 3.35e12)
    hot = dataclasses.replace(H100, lasting_flop_s=600e12)
    assert shared.all_rates(hot).lasting_flop_s == 4 * 600e12
    on_cpu = dataclasses.replace(shared, device=torch.device("cpu"))
    assert on_cpu.all_rates(H100) == H100  # one processor, however many ranks


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="A, B, C, mixed"):
        CliRunner().invoke(cli, ["bench", "--workload", "D"], catch_exceptions=False)
    arguments = ["bench", "--model", "random:tiny", "--set", "max_model_len=9", "--device", "cpu"]
    with pytest.raises(UsageError, match="sequences of 129 tokens"):
        CliRunner().invoke(cli, [*arguments, "--workload", "A"], catch_exceptions=False)


def test_kernels_of_torchs_profiler_lie_on_the_trace() -> None:
    args = {"device": 1, "stream": 7}
    document = {
        "baseTimeNanoseconds": 1_790_000_000_000_000_000,
        "traceEvents": [
            {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 5.5, "dur": 2, "args": args},
            {"ph": "X", "cat": "cpu_op", "name": "mm", "ts": 5.0, "dur": 9, "args": {}, "pid": 1},
            {"ph": "s", "cat": "ac2g", "name": "flow", "ts": 5.0, "pid": 1},
        ],
    }
    named, gemm = gpu_events(document)
    assert named["args"] == {"name": "GPU 1"} and gemm["pid"] == named["pid"]
    assert gemm["ts"] == 1_790_000_000_000_005.5 and gemm["tid"] == 7
    check_trace([named, gemm])
