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
    difference = verify.Difference(
        prompt=1, prompt_tokens=17, position=3, expected=5, found=6 if differs else 5
    )
    case = verify.CaseReport(
        case=verify.Case(transport="tcp"),
        equal=1 if differs else 2,
        differences=[difference] if differs else [],
        preemptions=0,
        failed_pulls=0,
        pulled_bytes=2**20,
        seconds=1.5,
    )
    return verify.Report(model="m", prompts=2, max_tokens=4, cases=[case])


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
    assert ("DIFFERS" in done.output) is differs
    assert f"{1 if differs else 2} of 2 equal" in done.output
    if differs:
        assert isinstance(done.exception, EngineError) and done.exception.exit_code == 6
    else:
        assert done.exit_code == 0
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    assert json.loads(as_json.stdout)["cases"][0]["case"]["transport"] == "tcp"
