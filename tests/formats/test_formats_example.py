"""`examples/prompts.jsonl` shows what it should, and one of its lines is wrong on purpose."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from pdbatch.formats import ParsedRequest, Reject, read_requests
from pdbatch.formats.fields import REFUSED, PlainLine

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/prompts.jsonl"


def test_the_example() -> None:
    found = list(read_requests(EXAMPLE))
    good = [each for each in found if isinstance(each, ParsedRequest)]
    (bad,) = [each for each in found if isinstance(each, Reject)]
    assert bad.custom_id == "deliberately-wrong-temperature"
    assert bad.error.param == "body.temperature"
    assert len(good) >= 64 and len({each.custom_id for each in found}) == len(found)
    params = [each.spec.sampling for each in good]
    assert sum(p.n * (p.max_tokens or 10**6) for p in params) <= 2_200  # minutes on a CPU
    assert {each.spec.form for each in good} == {"openai", "plain"}
    assert {each.spec.endpoint for each in good} == {"/v1/chat/completions", "/v1/completions"}
    assert any(p.n == 2 for p in params) and any(p.stop for p in params)
    assert any(p.seed is not None and not p.greedy for p in params)
    assert any(p.logprobs is not None for p in params)
    assert any(each.spec.prompt_token_ids for each in good)
    heads = Counter(
        each.spec.messages[0]["content"]
        for each in good
        if each.spec.messages and each.spec.messages[0]["role"] == "system"
    )
    ((shared, count),) = heads.most_common(1)
    assert count >= 20 and len(shared) > 1_000
    text = EXAMPLE.read_text(encoding="utf-8")
    assert all(word in text for word in ("长城", "日本", "한국", "مصر", "भारत", "Ελλάδας", "🌧️"))
    assert json.dumps("长城")[1:-1] not in text  # readable, not escaped


def test_the_page_names_every_field() -> None:
    page = (EXAMPLE.parents[1] / "docs/formats.md").read_text(encoding="utf-8")
    names = {*PlainLine.__struct_fields__, *REFUSED}
    assert {name for name in names if f"`{name}`" not in page} == set()
