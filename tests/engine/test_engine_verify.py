"""Prefill, hand-off and decode give the tokens of transformers' `generate`, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from pdbatch.engine import verify

torch.set_num_threads(1)
FAMILIES = ["llama", "qwen3", "gemma2", "mistral", "ernie4_5", "ernie4_5_moe", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_agree_with_generate(family: str, tmp_path: Path) -> None:
    tiny_models.make(family).save_pretrained(tmp_path / family)
    report = verify.run(
        str(tmp_path / family), num_prompts=12, longest=300, max_tokens=12, processes=False
    )
    for case in report.cases:
        assert case.problem is None, case
        assert not case.mismatches, case
        assert (case.cached_tokens > 0) == case.prefix_caching
        assert (case.preemptions > 0) >= case.preemption
        assert case.failed_pulls == 0 and case.pulled_bytes > 0
    assert report.ok and len(report.cases) == 6
    assert {case.transport for case in report.cases} == {"shm", "tcp"}


def test_two_processes_agree_with_generate(tmp_path: Path) -> None:
    tiny_models.make("llama").save_pretrained(tmp_path / "llama")
    report = verify.run(
        str(tmp_path / "llama"),
        num_prompts=8,
        longest=200,
        transports=("shm",),
        prefix_caching=(True,),
        preemption=False,
        threads=1,
    )
    assert report.ok, report


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a reference that differs in one token is told apart."""
    tiny_models.make("llama").save_pretrained(tmp_path / "llama")
    right = verify.reference

    def wrong(*args):
        for index, tokens in enumerate(right(*args)):
            yield [*tokens[:2], (tokens[2] + 1) % 199, *tokens[3:]] if index == 1 else tokens

    monkeypatch.setattr(verify, "reference", wrong)
    report = verify.run(
        str(tmp_path / "llama"),
        num_prompts=3,
        longest=50,
        transports=("shm",),
        prefix_caching=(True,),
        preemption=False,
        processes=False,
    )
    assert not report.ok
    (case,) = report.cases
    (mismatch,) = case.mismatches
    assert (mismatch.prompt, mismatch.position, case.equal) == (1, 2, 2)
