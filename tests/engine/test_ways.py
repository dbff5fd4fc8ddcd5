"""Which transports an engine opens, and what becomes of a hand-off when the best one fails."""

from __future__ import annotations

import errno
import logging

import pytest

from kvxfer import Transport
from kvxfer.choice import AUTO
from kvxfer.errors import KVUsageError
from kvxfer.offers import Offer
from kvxfer.opening import open_transport
from pdbatch.config import TRANSPORTS
from pdbatch.engine import ways
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.messages import Adopt, Adoption, EngineRequest, Finished, Pulled, Submit
from pdbatch.engine.null import NullEngine
from pdbatch.errors import ConfigError
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams


def config(*names: str, role: str = "prefill") -> EngineConfig:
    values = {"model": "null", "home": "unused", "engine": "null", "host": "h", "secret": "s"}
    return EngineConfig(**values, role=role, worker=role, kv_transport=names)


def offers(*usable: str) -> list[Offer]:
    return [Offer(name, name in usable, f"because of {name}") for name in AUTO]


def test_settings_and_kvxfer_know_the_same_names() -> None:
    assert TRANSPORTS == AUTO


def test_auto_opens_what_is_usable_and_tells_why_not_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ways, "available", lambda device: offers("shm", "tcp"))
    with caplog.at_level(logging.INFO, "pdbatch.engine.ways"):
        opened = ways.transports(config("auto"))
    assert [way.name for way in opened] == ["shm", "tcp"]
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert caplog.messages == [
        "KV does not move by cuda_ipc: because of cuda_ipc",
        "KV does not move by rdma: because of rdma",
        "KV moves by shm, tcp",
    ]
    for way in opened:
        way.close()


@pytest.mark.parametrize(
    ("names", "message", "remedy"),
    [
        (("shm", "rdma"), "rdma cannot be used here: because of rdma", "say `auto`"),
        (("tpc",), "no transport 'tpc'", "Did you mean tcp"),
    ],
)
def test_what_was_named_and_cannot_be_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], message: str, remedy: str
) -> None:
    monkeypatch.setattr(ways, "available", lambda device: offers("shm", "tcp"))
    with pytest.raises(ConfigError, match=message) as caught:
        NullEngine(config(*names))
    assert remedy in (caught.value.remedy or "")


def test_one_that_does_not_open_is_left_out_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[str] = []

    def open_or_fail(name: str, **values: str) -> Transport:
        if name == "rdma":
            raise KVUsageError("no memory to lock")
        made = open_transport(name, **values)
        close = made.close
        monkeypatch.setattr(made, "close", lambda: (closed.append(name), close()))
        return made

    monkeypatch.setattr(ways, "available", lambda device: offers("shm", "rdma", "tcp"))
    monkeypatch.setattr(ways, "open_transport", open_or_fail)
    opened = ways.transports(config("auto"))
    assert [way.name for way in opened] == ["shm", "tcp"]
    assert "KV does not move by rdma: it cannot be opened: no memory to lock" in caplog.messages
    with pytest.raises(ConfigError, match="rdma cannot be opened: no memory to lock"):
        ways.transports(config("shm", "rdma"))
    assert closed == ["shm"], "what was open already is not left behind"
    for way in opened:
        way.close()


def test_an_engine_says_which_ways_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "available", lambda device: offers("shm"))
    engine = NullEngine(config("auto", role="decode"))
    assert engine.info.transports == ["shm"] and engine.info.listen_host == "127.0.0.1"
    engine.close()
    assert NullEngine(config("auto", role="mixed")).info.transports == []


def test_a_way_that_fails_is_left_for_the_next_with_its_errno(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Transport] = []

    def open_and_keep(name: str, **values: str) -> Transport:
        made.append(open_transport(name, **values))
        return made[-1]

    monkeypatch.setattr(ways, "open_transport", open_and_keep)
    prefill = NullEngine(config("tcp", "shm"))
    made[0].close()  # nobody listens any more: the peer's address refuses
    decode = NullEngine(config("tcp", "shm", role="decode"))
    params = SamplingParams(max_tokens=3)
    spec = RequestSpec(prompt="a prompt", sampling=params)
    prefill.handle(Submit([EngineRequest(key="job:0", spec=spec)]))
    (prefilled,) = prefill.step()
    (handoff,) = prefilled.handoffs
    decode.handle(Adopt([Adoption(handoff.handoff_id, handoff.descriptor)]))
    pulled, finished = decode.step()
    assert pulled == Pulled([handoff.handoff_id])
    assert isinstance(finished, Finished) and finished.outputs[0].error is None
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert warning.name == "kvxfer.consumer"
    assert f"tcp failed (PeerLost, errno {errno.ECONNREFUSED})" in warning.getMessage()
    for engine in (prefill, decode):
        engine.close()


def test_one_that_cannot_serve_the_pool_is_left_out_under_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: object, region: object) -> None:
        raise OSError(errno.ENOMEM, "not so much memory may be locked")

    monkeypatch.setattr(ways, "available", lambda device: offers("shm", "tcp"))
    monkeypatch.setattr("kvxfer.transports.tcp.TcpTransport.serve", refuse)
    engine = NullEngine(config("auto"))
    assert engine.info.transports == ["shm"]
    assert any("tcp does not serve: [Errno 12]" in message for message in caplog.messages)
    engine.close()
    with pytest.raises(OSError, match="locked"):
        NullEngine(config("shm", "tcp"))
