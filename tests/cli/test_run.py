"""`pdbatch run` and `pdbatch up`: real processes, played workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdbatch.client import Client
from pdbatch.config import Settings

PLAYED = Path(__file__).with_name("played.py")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Start]:
    """Starts a program in `tmp_path`; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def run(*argv: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            env={**os.environ, **settings.to_env()},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = 60) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {deadline_s} s: {what}"
        time.sleep(0.02)


def processes_with(text: str) -> list[int]:
    """Processes whose environment or command holds `text`, this one left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                facts = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in facts:
                found.append(int(folder.name))
    return found


def test_a_run_writes_results_errors_and_a_summary(
    start: Start, prompts: Path, tmp_path: Path
) -> None:
    process = start(PLAYED, "answer", "run", prompts, "--output", "out.jsonl")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 10, err
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["custom_id"] for r in results] == [f"r{n}" for n in range(10) if n != 3]
    (error,) = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert json.loads(error)["custom_id"] == "line-4"
    for words in ("completed", "out.jsonl (9 lines)", "errors.jsonl (1 lines)", "prefill"):
        assert words in out
    assert "10 requests read, 1 rejected" in err
    assert "completed: 10 of 10 requests" in err
    assert processes_with(str(tmp_path)) == []


def test_a_clean_run_leaves_no_error_file_and_exits_with_0(start: Start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"a"\n"b"\n')
    process = start(PLAYED, "answer", "run", "in.jsonl", "-o", "out.jsonl", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["counts"]["succeeded"] == 2
    assert document["output"] == "out.jsonl" and document["errors"] is None
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["in.jsonl", "out.jsonl"]


def test_results_to_stdout_stand_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"a"\n')
    process = start(PLAYED, "answer", "run", "in.jsonl", "-o", "-")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [json.loads(line)["custom_id"] for line in out.splitlines()] == ["line-1"]
    assert "completed" in err


def test_workers_that_cannot_start_end_the_run(
    start: Start, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('"a"\n')
    process = start(PLAYED, "broken", "run", "in.jsonl", "-o", "out.jsonl", "--model", "nix")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 6
    assert "worker of nix cannot run: the model nix cannot be found" in err
    assert "-1.log" in err and "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()
    assert client.jobs()[0].state == "cancelled"
    assert processes_with(str(tmp_path)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_and_says_how_to_go_on(
    start: Start, client: Client, prompts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(PLAYED, "idle", "run", prompts, "-o", "out.jsonl")
    wait_until(lambda: len(client.workers()) == 2, "two workers")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (view,) = client.jobs()
    assert view.state == "cancelled"
    assert f"pdbatch results {view.id} --output FILE" in err
    assert "Traceback" not in err
    assert processes_with(str(tmp_path)) == []


def test_only_wrong_lines_need_no_workers(start: Start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{\n")
    process = start(PLAYED, "broken", "run", "in.jsonl", "-o", "out.jsonl")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 10, err
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 1


def test_an_output_that_cannot_be_is_said_before_the_work(
    start: Start, client: Client, prompts: Path
) -> None:
    process = start(PLAYED, "answer", "run", prompts, "-o", "no/such/folder/out.jsonl")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "does not exist" in err
    assert client.jobs() == []


def test_up_runs_a_procfile_and_a_run_uses_its_redis(
    start: Start, client: Client, prompts: Path, tmp_path: Path
) -> None:
    python = sys.executable
    (tmp_path / "Procfile").write_text(
        "redis: pdbatch redis\n"
        f"mixed: PDBATCH_WORKER_NAME=w {python} {PLAYED} worker answer\n"
        f"short: {python} -c \"print('short life')\"\n"
    )
    up = start("-u", "-m", "pdbatch.cli", "up")
    wait_until(lambda: client.workers(), "a worker")
    wait_until(lambda: (client.settings.home / "run" / "redis.sock").exists(), "a socket")
    run = start("-m", "pdbatch.cli", "run", prompts, "-o", "out.jsonl")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 10, err
    assert "using the cluster that runs" in err
    up.send_signal(signal.SIGTERM)
    out, err = up.communicate(timeout=60)
    assert up.returncode == 0, err
    assert "short      | short life" in out
    assert "short      | ended by exit code 0" in err and "starts again in 0.5 s" in err
    assert "killed" not in err
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("decode", [1, 0])
def test_a_run_on_real_workers_with_the_null_engine(
    start: Start, tmp_path: Path, decode: int
) -> None:
    lines = [{"id": f"r{n}", "prompt": f"prompt {n}", "max_tokens": 3} for n in range(300)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("run", "in.jsonl", "-o", "out.jsonl", "--decode", decode, "--json")
    process = start("-m", "pdbatch.cli", *arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["counts"]["succeeded"] == 300
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["custom_id"] for result in results] == [f"r{n}" for n in range(300)]
    workers = {tuple(r["response"]["body"]["pdbatch"]["workers"].values()) for r in results}
    names = {name.split("@")[0].rsplit("-", 2)[0] for pair in workers for name in pair if name}
    assert names == ({"prefill", "decode"} if decode else {"mixed"})
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
def test_a_model_that_is_nowhere_ends_the_run_with_its_name(
    settings: Settings, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('"a"\n')
    arguments = ("in.jsonl", "-o", "out.jsonl", "--model", "./nowhere", "--set", "engine=auto")
    process = start("-m", "pdbatch.cli", "run", *arguments, "--decode", "0")
    _, err = process.communicate(timeout=280)
    assert process.returncode == 6, err
    assert "nowhere" in err.splitlines()[-2] and "Traceback" not in err
