"""The channel: frames arrive whole and in order, in both directions at once, until the end."""

from __future__ import annotations

import threading

import pytest

from pdbatch.engine.ipc import Channel, ChannelClosed, channel_pair, engine_end, main_end
from pdbatch.engine.messages import Abort, Command, Drained, Event, Unpin


@pytest.fixture
def ends() -> tuple[Channel[Event], Channel[Command]]:
    ours, theirs = channel_pair()
    return main_end(ours), engine_end(theirs)


def test_messages_arrive_whole_and_in_order(ends) -> None:
    main, engine = ends
    sent = [Abort(keys=[f"k{i}"]) for i in range(100)] + [Unpin(handoff_ids=["h"])]
    for message in sent:
        main.send(message)
    assert engine.receive_all() == sent
    assert engine.receive(timeout_s=0) is None


def test_two_peers_that_send_at_once_do_not_block_each_other(ends) -> None:
    """The engine is one thread: while it waits to send, it takes in what the main sends."""
    main, engine = ends
    big = ["x" * 1000] * 3000
    received = []

    def talk() -> None:
        main.send(Abort(keys=big))
        received.append(main.receive(timeout_s=20))

    talker = threading.Thread(target=talk)
    talker.start()
    engine.send(Drained(dropped=big))  # both send three megabytes; neither reads before
    assert engine.receive(timeout_s=20) == Abort(keys=big)
    talker.join(timeout=20)
    assert received == [Drained(dropped=big)]


def test_messages_before_the_end_are_delivered_then_the_end_raises(ends) -> None:
    main, engine = ends
    main.send(Abort(keys=["a"]))
    main.close()
    assert engine.receive(timeout_s=5) == Abort(keys=["a"])
    with pytest.raises(ChannelClosed):
        engine.receive(timeout_s=5)
    with pytest.raises(ChannelClosed):
        engine.send(Drained(dropped=["x"] * 100_000))


def test_close_wakes_a_waiting_receiver(ends) -> None:
    main, _engine = ends
    raised = threading.Event()

    def receive() -> None:
        with pytest.raises(ChannelClosed):
            main.receive()
        raised.set()

    thread = threading.Thread(target=receive)
    thread.start()
    main.close()
    assert raised.wait(10)
    thread.join()
