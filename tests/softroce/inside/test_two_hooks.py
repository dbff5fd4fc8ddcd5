"""Two machines, and what can be done to them."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.softroce.inside.lab_hooks import LAB, OTHER_ADDRESS, LabError, Peer, own_link

_LISTENS = """
import socket
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("listens", flush=True)
    while True:
        with server.accept()[0] as sock:
            sock.sendall(sock.recv(10))
"""


@pytest.fixture
def echo() -> Iterator[Peer]:
    """A server on the other machine."""
    with LAB.python(_LISTENS) as peer:
        assert peer.line() == "listens"
        yield peer


def reaches() -> bool:
    """Whether the server answers within a second."""
    try:
        with socket.create_connection((OTHER_ADDRESS, 7000), 1) as sock:
            sock.settimeout(1)
            sock.sendall(b"hello")
            return sock.recv(10) == b"hello"
    except OSError:
        return False


def settles(holds: Callable[[], bool], timeout_s: float = 30) -> bool:
    """Whether it holds in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def state() -> str:
    """Of the first RDMA device."""
    return Path("/sys/class/infiniband/rxe0/ports/1/state").read_text().split()[-1]


def test_commands_of_the_other_machine() -> None:
    with LAB.start(["bash", "-c", "hostname; read -r x; echo $x >&2; exit 3"]) as peer:
        assert peer.line() == "lab2"
        peer.say("so it is")
        assert peer.wait() == (3, "lab2\n", "so it is\n")


@pytest.mark.parametrize(("device", "address"), [("rxe0", "192.0.2.2"), ("rxe1", "198.51.100.2")])
def test_each_device_reads_the_others_memory(device: str, address: str) -> None:
    words = ["ib_read_bw", "-d", device, "-x", "1", "-s", "65536", "-n", "20", "-F"]

    def read() -> str:
        return subprocess.run([*words, address], capture_output=True, text=True).stdout

    with LAB.start(words) as server:
        assert settles(lambda: " 65536 " in read())
        assert server.wait()[0] == 0


def test_a_stopped_process_goes_on(echo: Peer) -> None:
    assert reaches()
    echo.stop()
    assert not reaches()
    echo.go_on()
    assert settles(reaches)


def test_a_killed_process_is_gone(echo: Peer) -> None:
    assert reaches()
    echo.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((OTHER_ADDRESS, 7000), 5)


@pytest.mark.parametrize("whose", ["own", "other"])
def test_cables(echo: Peer, whose: str) -> None:
    assert settles(reaches)
    LAB.plug(whose, up=False)
    if whose == "own":
        assert settles(lambda: state() == "DOWN")
    assert not reaches()
    assert whose == "own" or state() == "ACTIVE"
    LAB.plug(whose, up=True)
    assert settles(lambda: state() == "ACTIVE") and settles(reaches)


def test_an_interface_that_is_taken_down(echo: Peer) -> None:
    own_link(up=False)
    assert settles(lambda: state() == "DOWN") and not reaches()
    own_link(up=True)
    assert settles(lambda: state() == "ACTIVE") and settles(reaches)


def test_reset(echo: Peer) -> None:
    LAB.reset_other()
    with pytest.raises(LabError, match="lab2 was reset"):
        echo.wait(240)
    LAB.wait_other()
    assert not reaches()
    with LAB.python(_LISTENS) as again:
        assert again.line() == "listens" and settles(reaches)
