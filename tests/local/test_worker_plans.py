"""Procfiles, commands of processes, plans of workers, and the last words of a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdbatch.config import Settings
from pdbatch.errors import ConfigError
from pdbatch.local.cluster import plan_workers
from pdbatch.local.processes import worker_argv, worker_env, worker_queues
from pdbatch.local.procfile import DEFAULT_PROCFILE, procfile_specs, read_procfile
from pdbatch.local.reason import last_words
from pdbatch.queues import queue_names

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_procfile_here_is_the_built_in_one() -> None:
    assert (ROOT / "Procfile").read_text(encoding="utf-8") == DEFAULT_PROCFILE
    names = list(read_procfile(DEFAULT_PROCFILE))
    assert names == ["redis", "reconciler", "prefill", "decode", "flower"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "web\n", "web:\n", ": cmd\n", "a: b\na: c\n"])
def test_a_broken_procfile_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ConfigError, match="Procfile"):
        read_procfile(text)


def test_commands_run_as_one_process_with_their_variables() -> None:
    commands = read_procfile("redis: a\nworker: X=1 prog --flag 'two words'  # no comment\n")
    redis, worker = procfile_specs(commands, {"PATH": "/bin"})
    assert redis.stops_last and not worker.stops_last
    assert worker.argv == ("/bin/sh", "-c", "exec env X=1 prog --flag 'two words'  # no comment")
    assert worker.env["PATH"].split(os.pathsep)[-1] == "/bin"


def test_a_worker_listens_to_its_models_queues_and_a_decode_worker_to_none_of_them() -> None:
    assert worker_queues("mixed", "m", "w") == [*queue_names("m"), "pdbatch.generate"]
    assert worker_queues("prefill", "m", "w") == worker_queues("mixed", "m", "w")
    assert worker_queues("decode", "m", "w") == ["pdbatch.control.w"]


def test_the_workers_command_and_environment(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, role="decode", worker_name="w", worker_shards=3)
    argv = worker_argv(settings)
    assert argv[argv.index("--hostname") :][:2] == ("--hostname", "w@%h")
    assert argv[argv.index("--concurrency") :][:2] == ("--concurrency", "3")
    env = worker_env(settings)
    assert env["CELERY_CUSTOM_WORKER_POOL"] == "tasks.pool:EnginePool"
    assert Settings.load(env={k: v for k, v in env.items() if k.startswith("PDBATCH_")}) == settings


def test_plans() -> None:
    plans = plan_workers({"b", "a"}, prefill=2, decode=1)
    assert [(p.model, p.role) for p in plans[:3]] == [
        ("a", "prefill"),
        ("a", "prefill"),
        ("a", "decode"),
    ]
    assert len({p.name for p in plans}) == len({p.log_name for p in plans}) == 6
    assert [p.role for p in plan_workers({"a"}, prefill=1, decode=0)] == ["mixed"]
    devices = [p.device for p in plan_workers({"a"}, 2, 1, devices="cuda:0, cuda:1")]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    four = "cuda:0,cuda:1,cuda:2,cuda:3"
    shared = [p.device for p in plan_workers({"a"}, 1, 1, devices=four, ranks=2)]
    assert shared == ["cuda:0,cuda:1", "cuda:2,cuda:3"]
    assert plan_workers({"a"}, 1, 0, devices="cuda:2", ranks=2)[0].device == "cuda:2"
    with pytest.raises(
        ConfigError, match="2 devices cannot be shared out among workers that need 3"
    ):
        plan_workers({"a"}, 1, 1, devices="cuda:0,cuda:1", ranks=3)
    with pytest.raises(ConfigError, match="can do no work"):
        plan_workers({"a"}, prefill=0, decode=3)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        (
            "Traceback (most recent call last):\n  File x\npdbatch.errors.ModelError: no model y\n"
            "[INFO] bye\n",
            "ModelError: no model y",
        ),
        ("ValueError: a\npdbatch: error: the model x is missing\nbye\n", "the model x is missing"),
        ("[ERROR] pdbatch: no such device\n", "no such device"),
    ],
)
def test_last_words(log: str, words: str) -> None:
    assert last_words(log) == words
