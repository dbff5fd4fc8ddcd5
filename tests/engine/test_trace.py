"""Traces of engines in their own processes: what stands in them, and that a killed one is read."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.messages import (
    Adopt,
    Adoption,
    EngineRequest,
    Event,
    Finished,
    Prefilled,
    Pulled,
    Ready,
    Stats,
    Submit,
    Unpin,
)
from pdbatch.engine.spawn import EngineProcess
from pdbatch.engine.trace import Tracer
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

DEADLINE_S = 120.0


def start(folder: Path, role: Literal["prefill", "decode", "mixed"]) -> EngineProcess:
    config = EngineConfig(
        model="random:tiny",
        home="/nonexistent",
        role=role,
        device="cpu",
        worker=f"{role} 1",
        num_blocks=64,
        threads=1,
        trace=str(folder),
        kv_transport=("shm",),
    )
    return EngineProcess.start(config, env=os.environ | {"OMP_NUM_THREADS": "1"})


def until(engine: EngineProcess, kind: type[Any]) -> Any:
    """The next event of this kind, whatever comes before it."""
    while True:
        event: Event | None = engine.channel.receive(DEADLINE_S)
        assert event is not None, f"no {kind.__name__} in {DEADLINE_S} s"
        if isinstance(event, kind):
            return event


def request(number: int, tokens: int = 40) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = tuple(range(number, number + tokens))
    return EngineRequest(
        key=f"j:{number}", spec=RequestSpec(prompt_token_ids=prompt, sampling=params)
    )


def events_of(folder: Path, worker: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"{worker}-*.json")
    found = json.loads(path.read_text())
    assert isinstance(found, list)
    return found


def test_both_ends_of_a_handoff_are_traced(tmp_path: Path) -> None:
    prefill, decode = start(tmp_path, "prefill"), start(tmp_path, "decode")
    try:
        for engine in (prefill, decode):
            until(engine, Ready)
        prefill.channel.send(Submit([request(1), request(2)]))
        handoffs = until(prefill, Prefilled).handoffs
        while len(handoffs) < 2:
            handoffs += until(prefill, Prefilled).handoffs
        adoptions = [Adoption(one.handoff_id, one.descriptor) for one in handoffs]
        decode.channel.send(Adopt(adoptions))
        pulled: set[str] = set()
        while len(pulled) < 2:
            pulled.update(until(decode, Pulled).handoff_ids)
        prefill.channel.send(Unpin(sorted(pulled)))
        done = 0
        while done < 2:
            done += len(until(decode, Finished).outputs)
        assert prefill.close() == decode.close() == 0
    finally:
        prefill.kill()
        decode.kill()
    for worker, spans in (
        ("prefill-1", {"schedule", "input", "launch", "sample", "wait", "advance", "hand-off"}),
        ("decode-1", {"schedule", "input", "launch", "sample", "wait", "advance", "pulls", "pull"}),
    ):
        events = events_of(tmp_path, worker)
        seen = Counter(event["name"] for event in events if event["ph"] == "X")
        assert spans | {"step"} <= seen.keys(), (worker, seen)
    pulls = [event for event in events if event["name"] == "pull"]
    assert [event["args"]["bytes"] > 0 for event in pulls] == [True, True]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert all(threads[event["tid"]].startswith("pdbatch-pull") for event in pulls)
    assert "engine" in threads.values()


def test_the_trace_of_a_killed_worker_lacks_its_end_alone(tmp_path: Path) -> None:
    engine = start(tmp_path, "mixed")
    try:
        until(engine, Ready)
        (path,) = tmp_path.glob("mixed-1-*.json") if any(tmp_path.iterdir()) else (None,)
        engine.channel.send(Submit([request(1)]))
        until(engine, Finished)
        until(engine, Stats)
        while path is None or '"advance"' not in path.read_text():
            until(engine, Stats)  # sent twice a second: the trace is written as time goes by
            (path,) = tmp_path.glob("mixed-1-*.json")
    finally:
        engine.kill()
    text = path.read_text()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(text)
    events = json.loads(text.rstrip().rstrip(",") + "]")
    assert {"step", "launch"} <= {event["name"] for event in events}


def test_a_tracer_that_was_closed_takes_events_in_silence(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path / "new" / "trace.json", "me")
    tracer.span("one", 1.0, 1.5)
    tracer.close()
    tracer.span("two", 2.0, 2.5)
    tracer.flush()
    tracer.close()
    events = json.loads(tracer.path.read_text())
    assert [event["name"] for event in events] == [
        "process_name",
        "thread_name",
        "one",
        "trace ends",
    ]
    assert events[2]["dur"] == 500_000
