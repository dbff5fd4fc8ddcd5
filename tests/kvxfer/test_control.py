"""The control connection: who gets in, what an answer may be, what ends with a session."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvxfer import AccessDenied, BadDescriptor, PeerLost, Revoked, TransferTimeout
from kvxfer.control import ControlClient, ControlServer, Message, Session
from kvxfer.testing.checks import settles

SECRET = b"open sesame"


@contextmanager
def serving(answer: Callable[[Session, Message], Message]) -> Iterator[ControlServer]:
    server = ControlServer(("127.0.0.1", 0), SECRET, answer, "kvxfer-test")
    try:
        yield server
    finally:
        server.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("kvxfer-test")]


def echo(session: Session, request: Message) -> Message:
    return {"said": request["say"], "peer": session.peer}


def test_questions_are_answered_in_turn() -> None:
    with serving(echo) as server:
        client = ControlClient(server.address, SECRET, 5)
        assert client.ask({"say": 1}, 5) == {"said": 1, "peer": "127.0.0.1"}
        assert client.ask({"say": "x" * 100_000}, 5)["said"] == "x" * 100_000
        client.close()
        with pytest.raises(PeerLost, match="closed"):
            client.ask({"say": 2}, 5)


def test_another_secret_hears_nothing() -> None:
    with serving(echo) as server, pytest.raises(AccessDenied):
        ControlClient(server.address, b"something else", 5)


def test_errors_travel_by_name_and_the_session_goes_on() -> None:
    def answer(session: Session, request: Message) -> Message:
        if request["say"] == "revoked":
            raise Revoked("it was revoked", errno=5)
        return {}

    with serving(answer) as server:
        client = ControlClient(server.address, SECRET, 5)
        with pytest.raises(Revoked, match="it was revoked") as found:
            client.ask({"say": "revoked"}, 5)
        assert found.value.errno == 5
        with pytest.raises(BadDescriptor, match="say"):
            client.ask({}, 5)
        assert client.ask({"say": "fine"}, 5) == {}
        client.close()


@pytest.mark.parametrize("how", ["reader", "server"])
def test_what_was_made_for_a_session_ends_with_it(how: str) -> None:
    ended: list[int] = []

    def answer(session: Session, request: Message) -> Message:
        session.closers += [lambda: ended.append(1), lambda: 1 // 0, lambda: ended.append(2)]  # type: ignore[list-item]
        return {}

    with serving(answer) as server:
        client = ControlClient(server.address, SECRET, 5)
        client.ask({}, 5)
        assert client.is_open and not ended
        if how == "reader":
            client.close()
        else:
            server.close()
        assert settles(lambda: ended == [2, 1]), ended
        assert not client.is_open


def test_no_answer_costs_the_timeout_and_the_connection() -> None:
    go_on = threading.Event()

    def answer(session: Session, request: Message) -> Message:
        go_on.wait(10)
        return {}

    with serving(answer) as server:
        client = ControlClient(server.address, SECRET, 5)
        start = time.monotonic()
        with pytest.raises(TransferTimeout):
            client.ask({}, 0.2)
        assert time.monotonic() - start < 2 and not client.is_open
        go_on.set()


def test_nobody_there_or_somebody_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()

        def greet() -> None:
            sock, _ = other.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(PeerLost, match="something else"):
            ControlClient(address, SECRET, 5)
        thread.join()
    with pytest.raises(PeerLost):
        ControlClient(address, SECRET, 5)


def test_nonsense_costs_the_sender_its_connection_alone() -> None:
    with serving(echo) as server:
        for bad in (b"\xff\xff\xff\xff", b"\0\0\0\x03abc", b"\0\0\0\x02[]"):
            client = ControlClient(server.address, SECRET, 5)
            assert client._sock is not None
            client._sock.sendall(bad)
            assert client._sock.recv(1) == b""
            client.close()
        client = ControlClient(server.address, SECRET, 5)
        assert client.ask({"say": 1}, 5)["said"] == 1
        client.close()
