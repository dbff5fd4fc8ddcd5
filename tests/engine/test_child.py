"""The engine's process: starts, works, reports, and never outlives what started it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_models

from pdbatch.engine.config import EngineConfig
from pdbatch.engine.ipc import ChannelClosed
from pdbatch.engine.messages import (
    Adopt,
    Adoption,
    Drain,
    Drained,
    EngineRequest,
    Event,
    Fatal,
    Finished,
    Prefilled,
    Pulled,
    Ready,
    Reset,
    Stats,
    Submit,
    Unpin,
)
from pdbatch.engine.spawn import EngineProcess
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_models.make("llama").save_pretrained(path)
    return path


@contextmanager
def started(config: EngineConfig) -> Iterator[EngineProcess]:
    process = EngineProcess.start(config, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.channel.close()


def config(role: str, model: str = "null", **changes) -> EngineConfig:
    values = {"engine": "null" if model == "null" else "auto", "threads": 1, "secret": "s"}
    values |= {"num_blocks": 64, "block_size": 8, "stats_interval_s": 0.1, "worker": role}
    return EngineConfig(model=str(model), home="unused", role=role, **(values | changes))


def expect(process: EngineProcess, kind: type[Event]) -> Event:
    """The next event of that kind; Stats may come in between."""
    while True:
        event = process.channel.receive(DEADLINE_S)
        assert event is not None, "no event in time"
        if isinstance(event, kind):
            return event
        assert isinstance(event, Stats), event


def requests(count: int, *, first: int = 0) -> list[EngineRequest]:
    sampling = SamplingParams(max_tokens=5, temperature=0)
    return [
        EngineRequest(
            key=f"job:{i}",
            spec=RequestSpec(prompt_token_ids=tuple(range(3, 20 + i)), sampling=sampling),
        )
        for i in range(first, first + count)
    ]


def hand_over(prefill: EngineProcess, decode: EngineProcess, count: int) -> dict:
    """What the main processes would do, until so many requests have ended."""
    outputs: dict = {}
    while len(outputs) < count:
        ready = select.select([prefill.channel, decode.channel], [], [], DEADLINE_S)[0]
        assert ready, "nothing happens"
        for event in [event for channel in ready for event in channel.receive_all()]:
            match event:
                case Prefilled(handoffs):
                    items = [Adoption(h.handoff_id, h.descriptor) for h in handoffs]
                    decode.channel.send(Adopt(items))
                case Pulled(ids):
                    prefill.channel.send(Unpin(ids))
                case Finished(done):
                    outputs |= {output.key: output for output in done}
                case other:
                    assert isinstance(other, Stats), other
    return outputs


@pytest.mark.parametrize("kind", ["null", "tiny"])
def test_two_processes_hand_over_and_end_in_order(kind: str, folder: Path) -> None:
    model = "null" if kind == "null" else str(folder)
    with started(config("prefill", model)) as prefill, started(config("decode", model)) as decode:
        infos = [expect(process, Ready).info for process in (prefill, decode)]
        assert infos[0].layout == infos[1].layout
        prefill.channel.send(Reset(4))
        prefill.channel.send(Submit(requests(6)))
        outputs = hand_over(prefill, decode, 6)
        assert {len(output.outputs[0].token_ids) for output in outputs.values()} <= {1, 2, 3, 4, 5}
        for process in (prefill, decode):
            process.channel.send(Drain())
            assert expect(process, Drained).dropped == []
            assert process.close() == 0  # with the block accounts checked


def test_stats_come_by_themselves() -> None:
    with started(config("mixed")) as process:
        expect(process, Ready)
        assert expect(process, Stats).total_blocks == 64
        process.channel.send(Submit(requests(2)))
        expect(process, Finished)
        while expect(process, Stats).output_tokens < 10:
            pass


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    with started(config("mixed", str(tmp_path / "nothing"))) as process:
        fatal = expect(process, Fatal)
        assert fatal.error == "ModelError" and "nothing" in fatal.message
        assert "give an alias" in fatal.message, "the remedy comes along"
        with pytest.raises(ChannelClosed):
            process.channel.receive(DEADLINE_S)
        assert process.process.wait(DEADLINE_S) == 1


def test_interrupts_are_the_main_process_s_affair() -> None:
    with started(config("mixed")) as process:
        expect(process, Ready)
        process.process.send_signal(signal.SIGINT)
        process.channel.send(Submit(requests(1)))
        expect(process, Finished)


def test_it_ends_when_its_channel_closes() -> None:
    with started(config("mixed")) as process:
        expect(process, Ready)
        process.channel.close()
        assert process.process.wait(DEADLINE_S) == 0


def test_it_ends_when_its_parent_is_killed() -> None:
    code = """
        import time
        from pdbatch.engine.config import EngineConfig
        from pdbatch.engine.messages import Ready
        from pdbatch.engine.spawn import EngineProcess
        config = EngineConfig(model="null", home="unused", engine="null")
        child = EngineProcess.start(config)
        while not isinstance(child.channel.receive(60), Ready):
            pass
        print(child.process.pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    engine = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert select.select([engine], [], [], DEADLINE_S)[0], "the engine outlives its parent"
    os.close(engine)
    parent.stdout.close()
