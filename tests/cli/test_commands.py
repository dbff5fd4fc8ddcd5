"""The program, in processes of its own: outputs, exit codes, help, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pdbatch.cli.app import COMMANDS, cli
from pdbatch.client import Client

from .conftest import PlayedWorker, Program

HEAVY = {"torch", "celery", "sqlalchemy", "transformers", "redis", "numpy", "rich", "msgspec"}


def _commands() -> list[tuple[str, click.Command]]:
    context = click.Context(cli)
    found: list[tuple[str, click.Command]] = []
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {sub}", each) for sub, each in command.commands.items()]
    return found


def test_help_lists_every_command_without_importing_any() -> None:
    code = (
        "import sys; sys.argv = ['pdbatch', '--help']\n"
        "from pdbatch.cli import main\n"
        "try: main()\n"
        "finally: print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, loaded = done.stdout.partition("LOADED")
    assert HEAVY.isdisjoint(loaded.split())
    assert not {m for m in loaded.split() if m.startswith(("pdbatch.cli.run", "pdbatch.store"))}
    for name, entry in COMMANDS.items():
        assert (f"  {name} " in text and entry.help in " ".join(text.split())) or entry.hidden


@pytest.mark.parametrize(("name", "command"), _commands(), ids=lambda value: str(value))
def test_every_command_and_option_has_help(name: str, command: click.Command) -> None:
    done = CliRunner().invoke(cli, [*name.split(), "--help"])
    assert done.exit_code == 0, done.output
    assert command.help and command.help.rstrip().endswith("."), name
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


def test_commands_are_light_until_they_run() -> None:
    modules = sorted({entry.where.split(":")[0] for entry in COMMANDS.values()})
    imports = "; ".join(f"import pdbatch.cli.{module}" for module in modules)
    code = f"import sys; {imports}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (HEAVY - {"msgspec"}).isdisjoint(done.stdout.split())


def test_submit_prints_the_id_alone_and_a_script_can_go_on(
    pdbatch: Program, client: Client, worker: PlayedWorker, prompts: Path, tmp_path: Path
) -> None:
    done = pdbatch("submit", prompts)
    job = done.stdout.strip()
    assert done.returncode == 0
    assert done.stdout == f"{job}\n" and job.startswith("job_")
    assert "10 requests read, 1 rejected" in done.stderr
    document = json.loads(pdbatch("status", job, "--json").stdout)
    assert document["state"] == "in_progress"
    assert document["counts"] == {
        "total": 10,
        "succeeded": 0,
        "rejected": 1,
        "failed": 0,
        "done": 1,
    }
    worker.work()
    done = pdbatch("results", job, "--output", "out.jsonl")
    assert done.returncode == 0 and done.stdout == ""
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    ids = [json.loads(line)["custom_id"] for line in lines]
    assert ids == ["r0", "r1", "r2", "r4", "r5", "r6", "r7", "r8", "r9"]
    assert pdbatch("results", job).stdout.splitlines() == lines
    (error,) = pdbatch("errors", job).stdout.splitlines()
    assert json.loads(error)["response"]["body"]["error"]["code"] == "invalid_json"
    assert json.loads(pdbatch("status", "--json").stdout)[0]["id"] == job
    human = pdbatch("status", job).stdout
    assert "completed" in human and "prompt tokens   45 (9 cached)" in human
    assert "KV moved        0.27 GB at 3.0 GB/s, 2.0% of the engines' time" in human
    moved = json.loads(pdbatch("status", job, "--json").stdout)
    assert moved["engine_s"] == 4.5 and moved["stages_s"]["transfer"] == pytest.approx(0.09)
    assert moved["transfer"] == {
        "bytes": 270_000_000,
        "bytes_per_s": pytest.approx(3e9),
        "share_of_engine_time": pytest.approx(0.02),
    }


def test_submit_and_wait_says_by_its_exit_code_how_the_job_ended(
    pdbatch: Program, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "one.jsonl").write_text('"a prompt"\n')
    assert pdbatch("submit", "bad.jsonl", "--wait").returncode == 10
    assert pdbatch("submit", "empty.jsonl", "--wait").returncode == 0
    late = pdbatch("submit", "one.jsonl", "--wait", "--timeout", "0.2")
    assert late.returncode == 7
    assert "no worker serves smollm2-135m" in late.stderr
    assert pdbatch("cancel", late.stdout.strip()).returncode == 0
    assert client.status(late.stdout.strip()).state == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("status", "job_none"), 3, "job_none"),
        (("results", "job_none"), 3, "job_none"),
        (("submit", "nowhere.jsonl"), 2, "nowhere.jsonl cannot be read"),
        (("frobnicate",), 2, "No such command"),
        (("submit",), 2, "Missing argument"),
        (("status", "--set", "shard_sise=3"), 2, "did you mean `shard_size`"),
        (("status", "--set", "shard_size=x"), 2, "shard_size takes a whole number"),
        (("results", "job_none", "--output", "no/such/dir/x"), 2, "does not exist"),
        (("status", "--database-url", "sqlite:///none.db"), 4, "pdbatch db upgrade"),
        (("db", "check", "--database-url", "sqlite:///none.db"), 4, "pdbatch db upgrade"),
        (("worker", "--broker-url", "amqp://x"), 5, "no Redis URL"),
    ],
)
def test_errors_are_one_line_and_a_remedy(
    pdbatch: Program, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = pdbatch(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_where(pdbatch: Program) -> None:
    done = pdbatch("status", "job_none", PDBATCH_DEBUG="1")
    assert done.returncode == 3 and "Traceback" in done.stderr


def test_db_upgrade_makes_a_database_and_check_agrees(pdbatch: Program) -> None:
    url = "sqlite:///mine.db"
    made = pdbatch("db", "upgrade", "--database-url", url)
    assert made.returncode == 0 and made.stdout.strip()
    again = pdbatch("db", "check", "--database-url", url)
    assert (again.returncode, again.stdout) == (0, made.stdout)


def test_version(pdbatch: Program) -> None:
    versions = json.loads(pdbatch("version", "--json").stdout)
    assert versions["pdbatch"] == "0.1.0" and versions["torch"]
    assert pdbatch("--version").stdout == "0.1.0\n"


def test_a_reader_that_leaves_is_no_error(
    pdbatch: Program, client: Client, worker: PlayedWorker
) -> None:
    job = client.submit([f"p{n}" for n in range(3000)])
    worker.work()
    command = (
        f"{sys.executable} -m pdbatch.cli results {job.id} | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        env={"PATH": "/usr/bin:/bin", **client.settings.to_env()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
