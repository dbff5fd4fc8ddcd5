"""Moments on the engine's stream, to be waited for on the host.

A step's kernels run after the call that launched them has returned. Whoever lets somebody else
read or write blocks (a peer, a pull's thread with a stream of its own) first marks the engine's
stream and then waits for the mark: what was launched before it is over then, on the device too.

    wait = mark()      on the engine's thread: everything launched so far
    wait()             on any thread: returns when that is done
"""

from __future__ import annotations

from collections.abc import Callable

Wait = Callable[[], None]
Mark = Callable[[], Wait]


def marker(device: str) -> Mark:
    """For a device of torch. On the CPU a call that has returned is over."""
    if not device.startswith("cuda"):
        return over

    import torch

    where = torch.device(device)

    def mark() -> Wait:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits sleeps
        event.record(torch.cuda.current_stream(where))
        return event.synchronize

    return mark


def over() -> Wait:
    """A mark where a call that has returned is over."""
    return _nothing


def _nothing() -> None:
    """Nothing to wait for."""
