"""What `pdbatch verify` prints, and how it exits; the comparison itself has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pdbatch.cli.app import cli
from pdbatch.engine import verify
from pdbatch.errors import EngineError


def _report(*, differs: bool) -> verify.Report:
    mismatch = verify.Mismatch(
        prompt=1, num_prompt_tokens=17, position=3, expected=[1, 2, 3, 5], got=[1, 2, 3, 6]
    )
    case = verify.Case(
        name="tcp, prefix caching on",
        transport="tcp",
        prefix_caching=True,
        preemption=False,
        ok=not differs,
        equal=1 if differs else 2,
        pulled_bytes=2**20,
        seconds=1.5,
        mismatches=[mismatch] if differs else [],
    )
    return verify.Report(
        model="m",
        num_prompts=2,
        shortest=5,
        longest=17,
        max_tokens=4,
        reference_seconds=1.0,
        cases=[case],
    )


@pytest.mark.parametrize("differs", [False, True])
def test_report_and_exit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differs: bool) -> None:
    asked: dict[str, Any] = {}

    def run(model: str, **options: Any) -> verify.Report:
        asked.update(options, model=model)
        return _report(differs=differs)

    monkeypatch.setattr(verify, "run", run)
    arguments = ["verify", "--model", "m", "--home", str(tmp_path), "--kv-transport", "tcp"]
    done = CliRunner().invoke(cli, [*arguments, "--prompts", "2"])
    assert asked["model"] == "m" and asked["transports"] == ("tcp",)
    assert asked["home"] == str(tmp_path) and asked["num_prompts"] == 2
    assert ("DIFFERS: prompt 1 (17 tokens), token 3" in done.output) is differs
    assert f"{1 if differs else 2} of 2 equal" in done.output
    if differs:
        assert isinstance(done.exception, EngineError) and done.exception.exit_code == 6
    else:
        assert done.exit_code == 0
    assert asked["kv_checksum"] is False
    for switch, expected in (("--kv-checksum", True), ("--no-kv-checksum", False)):
        CliRunner().invoke(cli, [*arguments, switch], env={"PDBATCH_KV_CHECKSUM": "true"})
        assert asked["kv_checksum"] is expected
    CliRunner().invoke(cli, arguments, env={"PDBATCH_KV_CHECKSUM": "true"})
    assert asked["kv_checksum"] is True
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    assert json.loads(as_json.stdout)["cases"][0]["transport"] == "tcp"
