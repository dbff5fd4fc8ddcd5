"""Ranks as processes: the same tokens as one, hand-offs between them, and deaths among them."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_handoff import Pair, make_requests, token_ids

from pdbatch.engine.build import build_engine
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.engine import Engine
from pdbatch.engine.llm import LLM
from pdbatch.engine.messages import EngineRequest, Fatal, Finished, Ready, Stats
from pdbatch.engine.parallel.devices import rank_devices
from pdbatch.engine.parallel.team import Team
from pdbatch.engine.spawn import EngineProcess
from pdbatch.errors import ConfigError, EngineDied, ModelError
from pdbatch.sampling import SamplingParams

MODEL = "random:tiny:2"


def engine(role: str, ranks: int, **changes: Any) -> Engine:
    values: dict[str, Any] = {"num_blocks": 80, "block_size": 8, "max_num_seqs": 8, "threads": 1}
    values |= {"worker": role, "secret": "s", "max_num_batched_tokens": 64, "device": "cpu"}
    values |= {"model": MODEL, "home": "unused", "role": role, "tensor_parallel_size": ranks}
    values |= {"kv_transport": ("shm",), "dtype": "float32"}
    return build_engine(EngineConfig(**(values | changes)))


def team_of(made: Engine) -> Team:
    assert isinstance(made._ranks, Team)
    return made._ranks


def run(made: Engine, requests: list[EngineRequest]) -> dict[str, list[list[int]]]:
    for request in requests:
        made.add(request)
    found: dict[str, list[list[int]]] = {}
    while len(found) < len(requests):
        for event in made.step():
            assert isinstance(event, Finished)
            found |= {output.key: token_ids(output) for output in event.outputs}
    return found


def test_two_ranks_give_the_tokens_of_one() -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 500) for _ in range(n)] for n in (5, 90, 1, 33, 40)]
    params = [SamplingParams(max_tokens=12, temperature=t, seed=4) for t in (0, 0, 0.8, 0, 0.8)]
    found = []
    for ranks in (1, 2):
        llm = LLM(
            MODEL,
            device="cpu",
            dtype="float32",
            threads=1,
            num_blocks=60,
            block_size=8,
            max_num_batched_tokens=48,
            tensor_parallel_size=ranks,
        )
        outputs = llm.generate(prompts, params)
        found.append([token_ids(output) for output in outputs])
        llm.close()
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("graphs", [True, False])
def test_two_gpus_give_the_tokens_of_one(graphs: bool) -> None:
    requests = make_requests(12, temperature=0, ignore_eos=True)
    found = []
    for ranks in (1, 2):
        made = engine("mixed", ranks, device="cuda:0", cuda_graphs=graphs)
        found.append(run(made, requests))
        made.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_preemption_and_several_outputs_and_running_ahead(run_ahead: bool) -> None:
    requests = make_requests(10, temperature=0.9, n=2, ignore_eos=True)
    found = []
    for ranks in (1, 2):
        made = engine("mixed", ranks, num_blocks=40, run_ahead=run_ahead, preempt_every_steps=7)
        found.append(run(made, requests))
        assert made.stats().preemptions
        made.check()
        made.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("theirs", "ours", "transport"), [(1, 2, "shm"), (2, 1, "tcp"), (2, 4, "shm"), (2, 2, "tcp")]
)
def test_kv_moves_between_different_numbers_of_ranks(
    theirs: int, ours: int, transport: str
) -> None:
    requests = make_requests(8, temperature=0)
    mixed = engine("mixed", 1)
    alone = run(mixed, requests)
    mixed.close()
    ways = {"kv_transport": (transport,), "kv_checksum": transport == "shm"}
    prefill, decode = engine("prefill", theirs, **ways), engine("decode", ours, **ways)
    assert prefill.info.layout == decode.info.layout
    pair = Pair(prefill, decode)
    pair.run(requests)
    assert {key: token_ids(output) for key, output in pair.outputs.items()} == alone
    assert not pair.codes
    stats = decode.stats()
    assert stats.pulled_bytes > 0
    pair.close()


@pytest.mark.parametrize("role", ["mixed", "decode"])
def test_a_rank_that_dies_ends_the_engine_and_all_ranks(role: str) -> None:
    made = engine(role, 4)
    team = team_of(made)
    processes = [member.process for member in team.members]
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    if role == "mixed":
        for request in make_requests(2, temperature=0):
            made.add(request)
    with pytest.raises(EngineDied, match="rank 2 ended with exit code -9"):
        while True:
            assert made.step() == []
    made.close()
    assert all(process.poll() is not None for process in processes)


def test_a_team_lets_go_of_graphs_before_it_leaves_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = engine("mixed", 2)
    team, order = team_of(made), []
    monkeypatch.setattr(team, "release", lambda: order.append("graphs"))
    monkeypatch.setattr(team.group, "close", lambda: order.append("group"))
    made.close()
    assert order == ["graphs", "group"]


def test_ranks_end_with_rank_0() -> None:
    text = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_parallel import engine, team_of\n"
        "made = engine('mixed', 2)\n"
        "print(*[member.process.pid for member in team_of(made).members], flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1
        watches = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        for watch in watches:
            assert select.select([watch], [], [], 30)[0], "a rank outlives rank 0"
            os.close(watch)


def test_an_idle_engine_process_says_that_a_rank_died() -> None:
    values: dict[str, Any] = {"model": MODEL, "home": "unused", "device": "cpu", "threads": 2}
    config = EngineConfig(**values, tensor_parallel_size=2, num_blocks=8, stats_interval_s=0.1)
    child = EngineProcess.start(config)
    try:
        assert isinstance(child.channel.receive(120), Ready)
        (rank,) = children(child.process.pid)
        os.kill(rank, signal.SIGKILL)
        while isinstance(event := child.channel.receive(60), Stats):
            pass
        assert event == Fatal("EngineDied", "rank 1 ended with exit code -9")
        assert child.process.wait(30) == 1
    finally:
        child.kill()
        child.channel.close()


def children(pid: int) -> list[int]:
    """Processes that a process has started, whichever of its threads did."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_what_goes_wrong_on_a_rank_is_said() -> None:
    with pytest.raises(ModelError, match="there is no model"):
        engine("mixed", 2, model="random:none")
    with pytest.raises(ConfigError, match="3 ranks cannot share 4 query heads"):
        engine("mixed", 3)


def test_devices_of_ranks() -> None:
    assert rank_devices("auto", 2, 0) == ["cpu", "cpu"]
    assert rank_devices("auto", 2, 4) == ["cuda:0", "cuda:1"]
    assert rank_devices("cuda:2", 2, 4) == ["cuda:2", "cuda:3"]
    assert rank_devices("cuda:3, cuda:0", 2, 4) == ["cuda:3", "cuda:0"]
    for device, size in (("cuda:3", 2), ("cuda:0,cuda:0", 2), ("cuda:0,cuda:1", 3), ("tpu", 1)):
        with pytest.raises(ConfigError):
            rank_devices(device, size, 4)
