"""A rank's process: `python -m pdbatch.engine.parallel.rank --fd N`, started by rank 0's.

    1. The first frame on the socket is `Start`.
    2. It says `Up` and meets the other ranks, loads its part of the model, makes its pool and warms
       up, in step with rank 0, then says `Up` again; or `Failed`, and exit code 1.
    3. Loop: orders in the order in which they were sent; ends of pulls as they come.
    4. `End`: it stops serving its pool, exit code 0.
    5. The socket's end (rank 0 is gone): the process ends at once, whatever it was doing.

SIGINT is ignored, as in the engine's process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdbatch.engine.child import end_with
from pdbatch.engine.ipc import Channel, ChannelClosed
from pdbatch.engine.parallel import messages as say
from pdbatch.engine.ports import PullRefused, PullResult
from pdbatch.errors import in_words

if TYPE_CHECKING:
    from pdbatch.engine.parallel.group import Group
    from pdbatch.engine.part import Part

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """The process's whole life; its exit code."""
    parser = argparse.ArgumentParser(description="a rank of an engine, started by rank 0")
    parser.add_argument("--fd", type=int, required=True, help="its end of the socket pair")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=parser.parse_args(argv).fd)
    end_with(sock)
    channel: Channel[say.Order] = Channel(sock, say.Order)
    try:
        start = channel.receive_as(say.Start)
        logging.basicConfig(
            level=os.environ.get("PDBATCH_LOG_LEVEL", "INFO").upper(),
            format=f"%(asctime)s %(levelname)s rank{start.rank}[%(process)d] %(name)s: %(message)s",
        )
        rank = build(start, channel)
        channel.send(say.Up())
        rank.serve()
    except ChannelClosed:
        return 0
    except BaseException as error:
        logger.exception("the rank ends")
        with contextlib.suppress(ChannelClosed):
            channel.send(say.Failed(type(error).__name__, in_words(error)))
        return 1
    return 0


def build(start: say.Start, channel: Channel[say.Order]) -> Rank:
    """Meet the others and build this rank's part."""
    import torch

    from pdbatch.engine.parallel.group import Group
    from pdbatch.engine.part import build_part

    config = start.config
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    channel.send(say.Up())  # rank 0 waits for the others at the meeting alone
    group = Group(Path(start.meeting), start.rank, config.tensor_parallel_size, device)
    return Rank(build_part(config, group=group), group, channel)


class Rank:
    """Obeys orders over its part."""

    def __init__(self, part: Part, group: Group, channel: Channel[say.Order]) -> None:
        self._part = part
        self._group = group
        self._channel = channel
        self._do: dict[type, Callable[[Any], None]] = {
            say.Step: self._step,
            say.CopyBlocks: lambda order: part.cache.copy_blocks(order.src, order.dst),
            say.Taken: self._taken,
            say.Pin: self._pin,
            say.Unpin: self._unpin,
            say.Pull: self._pull,
            say.NewLife: self._new_life,
        }

    def serve(self) -> None:
        """The loop, until `End`. Raises ChannelClosed at the socket's end."""
        gc.collect()
        gc.freeze()
        transfers = self._part.transfers
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if transfers is not None:
            poll.register(transfers.fileno(), select.POLLIN)
        while True:
            for order in self._channel.receive_all():
                if isinstance(order, say.End):
                    if transfers is not None:
                        transfers.close()
                    return
                self._do[type(order)](order)
            for ended in transfers.finished_pulls() if transfers is not None else ():
                self._tell_end(ended)
            if not self._channel.pending:
                poll.poll()

    def _step(self, order: say.Step) -> None:
        before = say.empty_tokens(order, self._group.device)
        if before is not None:
            self._group.broadcast_(before)
        self._part.runner.execute(say.input_of(order, before))

    def _taken(self, order: say.Taken) -> None:
        if self._part.on_take is not None:
            self._part.on_take(order.blocks)

    def _pin(self, order: say.Pin) -> None:
        described = self._transfers.describe(order.handoff_id, order.blocks, order.prompt, b"")
        self._channel.send(say.Pinned(described.to_json()))

    def _unpin(self, order: say.Unpin) -> None:
        self._transfers.unpin(order.handoff_id)

    def _pull(self, order: say.Pull) -> None:
        from pdbatch.engine.messages import Adoption

        try:
            incoming = self._transfers.read(Adoption(order.handoff_id, order.descriptor))
        except PullRefused as refused:
            self._tell_end(PullResult(order.handoff_id, code=refused.code, message=str(refused)))
            return
        self._transfers.start_pull(incoming, order.blocks, order.skip)

    def _new_life(self, order: say.NewLife) -> None:
        self._transfers.reset(order.epoch)

    def _tell_end(self, result: PullResult) -> None:
        from pdbatch.engine.parallel.transfers import answer_of

        self._channel.send(answer_of(result))

    @property
    def _transfers(self) -> Any:
        assert self._part.transfers is not None, "an order about KV to an engine that keeps its own"
        return self._part.transfers


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # NCCL's threads would wait for ranks that have gone
