"""The hand-off: an engine's end of it, and what the main process needs. Alone in importing kvxfer.

Who owns a block, as half-open intervals:

    [allocated, pinned)              the sequence, on the prefill engine
    [pin, unpin)                     the producer here: peers read it, nobody writes it
    [start_pull, its PullResult)     the pull here: one of its threads writes it
    [PullResult, freed)              the sequence, on the decode engine

What proves that the KV is the right one:

    before the read    layout's fingerprint (block sizes may differ: `kvxfer.geometry`); the
                       payload's prompt hashes to the descriptor's hash
    after the read     the producer's epoch and every block's generation are what they were when
                       the blocks were pinned; their checksums, where the producer sends them
                       (`kv_checksum`); the prompt's hash once more

Anything else ends as a `PullResult` with the error's name, and nothing of it is decoded. Pulls
run on threads of their own (`pull_threads`), so decode steps go on meanwhile; with none they run
where they are started. `fileno` becomes readable when one has ended.

Who may touch the memory of a block when. On a device what was launched goes on after the call, so
each touch also has a moment at which all before it must be over (`pdbatch.engine.fences`):

    who                 touches                  begins when                 is over
    steps               their sequences' blocks  launched, in stream order   in stream order
    a peer's read       what is pinned           the steps that wrote it     whenever it likes:
                                                 are retired, hence over     late ones are found out
    a pull, on streams  its target blocks        its thread has waited for   before its result,
    of its own                                   the engine's stream         good or bad
    the next owner      what it took             `take` has raised the       as its kind is
                                                 generations

    1. No peer sees half a prefill: a request is pinned when the step of its first token is
       retired, which waits for a mark that was made when that was launched (`stepper`), so for
       all that the prompt's steps wrote. What runs ahead of that step is not waited for.
    2. A read that overlaps a reuse is found out: generations rise in `take`, on the host, before
       the first kernel that writes is launched; the reader asks for them after its last byte.
    3. A pull overwrites nothing that is still used: blocks of a step in flight come back when it
       is retired, but a step that was dropped (a failure, a reset) is not waited for, so
       `start_pull` marks the engine's stream, and the pull waits for the mark before its first
       byte.
    4. Decode sees all that a pull wrote: a transport returns when its own stream is done, the
       result comes to the engine's thread after that, and only then steps are launched.
    5. Blocks of an aborted pull stay its own until its result, and no result comes before its
       writes are over: a transport that raises leaves nothing under way, either.
    6. `reset` raises the epoch and all generations: what peers read of the old life is void, and
       what was under way here falls under 3 and 5.
    7. What is read of a process that has died proves nothing. To notice its death (PeerLost) is
       the transport's business; the request is prefilled again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from kvxfer import (
    Claim,
    DeviceRegion,
    Ended,
    KVConsumer,
    KVDescriptor,
    KVLayout,
    KVProducer,
    KVTransferError,
    MemoryRegistry,
    Publication,
    RedisRegistry,
    Region,
    Registry,
    RegistryUnavailable,
    Transport,
    merge_parts,
    token_hash,
)
from pdbatch.engine import fences
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.memory import is_shortage, release_unused
from pdbatch.engine.messages import Adoption, Handoff
from pdbatch.engine.payload import HandoffPayload, decode_payload, encode_payload, unpack_tokens
from pdbatch.engine.ports import Incoming, PullRefused, PullResult
from pdbatch.engine.ways import rehearsed, serving, transports

__all__ = [
    "Claim",
    "DeviceRegion",
    "Ended",
    "KVLayout",
    "KVTransfers",
    "MemoryRegistry",
    "Publication",
    "Region",
    "Registry",
    "RegistryUnavailable",
    "joined_handoff",
    "make_region",
    "open_registry",
    "prompt_hash",
    "transports",
]

logger = logging.getLogger(__name__)


def open_registry(client: Any, model: str, layout: str) -> Registry:
    """Where hand-offs of one model and layout (`EngineInfo.layout`) are offered and claimed.

    `client` is a `redis.Redis` that gives bytes. Touches nothing until it is used.
    """
    return RedisRegistry(client, f"pdbatch:kv:{model}:{layout}")


def make_region(
    config: EngineConfig, num_blocks: int, block_bytes: int, device: str = "cpu"
) -> Region:
    """Memory for an engine's pool, on its device, that its transports reach."""
    if device.startswith("cuda"):
        from kvxfer.cuda import cuda_region

        return cuda_region(num_blocks, block_bytes, device, epoch=config.epoch)
    shared = config.role != "decode"
    return Region(num_blocks, block_bytes, epoch=config.epoch, shared=shared)


class KVTransfers:
    """See the module and `pdbatch.engine.ports.Transfers`. Owns the region given to it."""

    def __init__(
        self,
        region: Region,
        layout: KVLayout,
        config: EngineConfig,
        *,
        ways: Sequence[Transport] | None = None,
        mark: fences.Mark | None = None,
        pull_threads: int = 2,
    ) -> None:
        """`ways` replaces the configured transports (tests bring faults that way), `mark` the
        marks of the engine's stream."""
        self._region = region
        self._mark = mark or fences.marker(region.device)
        self._layout = layout
        self._timeout_s = config.kv_read_timeout_s
        self._ways = list(ways) if ways is not None else transports(config, region.device)
        self._producer: KVProducer | None = None
        self._consumer: KVConsumer | None = None
        if config.role != "decode":
            self._producer = KVProducer(
                region,
                self._ways,
                layout=layout,
                producer=config.worker,
                host=config.host,
                epoch=config.epoch,
                optional=config.kv_transport == ("auto",),
                checksum=config.kv_checksum,
            )
            self._ways = serving(self._ways, self._producer.endpoints)
        if config.role != "prefill":
            if ways is None:
                self._ways = rehearsed(self._ways, config, region)
            self._consumer = KVConsumer(region, self._ways, layout=layout)
        self._threads: ThreadPoolExecutor | None = None
        if pull_threads and self._consumer is not None:
            self._threads = ThreadPoolExecutor(pull_threads, thread_name_prefix="pdbatch-pull")
        self._ended: deque[PullResult] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def transports(self) -> list[str]:
        """The names of the ways that are open, best first."""
        return [way.name for way in self._ways]

    # --- producer's end

    def pin(
        self,
        handoff_id: str,
        blocks: Sequence[int],
        prompt: list[int],
        payload: HandoffPayload,
    ) -> Handoff:
        """Offer these blocks' KV to peers until `unpin`; every write to them must be over."""
        described = self.describe(handoff_id, blocks, prompt, encode_payload(payload))
        return joined_handoff(payload.key, described)

    def describe(
        self, handoff_id: str, blocks: Sequence[int], prompt: list[int], payload: bytes
    ) -> KVDescriptor:
        """`pin` on one of several ranks: its own part. When rank 0 has a step's tokens, that step's
        writes are over on every rank: its last sums came after them."""
        assert self._producer is not None, "a decode engine pins nothing"
        try:
            return self._producer.pin(handoff_id, blocks, prompt, payload)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
        release_unused()
        logger.warning("%s goes without checksums, for which there is no memory", handoff_id)
        return self._producer.pin(handoff_id, blocks, prompt, payload, checksum=False)

    def unpin(self, handoff_id: str) -> None:
        """Stop offering."""
        if self._producer is not None:
            self._producer.unpin(handoff_id)

    # --- consumer's end

    def read(self, adoption: Adoption) -> Incoming:
        """Decode and prove a descriptor. Raises PullRefused."""
        key = adoption.handoff_id.partition("/")[0]
        try:
            descriptor = KVDescriptor.from_json(adoption.descriptor)
            payload = decode_payload(descriptor.payload)
            prompt = unpack_tokens(payload.prompt)
            descriptor.prove_tokens(prompt)
        except KVTransferError as error:
            raise PullRefused(type(error).__name__, str(error), key) from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise PullRefused("BadDescriptor", f"its payload: {error}", key) from error
        if descriptor.layout != self._layout.fingerprint:
            message = f"it has layout {descriptor.layout}, ours is {self._layout.fingerprint}"
            raise PullRefused("LayoutMismatch", message, key)
        if descriptor.num_tokens != len(prompt):
            message = f"{len(prompt)} tokens in the payload, {descriptor.num_tokens} described"
            raise PullRefused("BadDescriptor", message, key)
        return Incoming(adoption.handoff_id, payload, prompt, descriptor)

    def start_pull(self, incoming: Incoming, blocks: Sequence[int], skip: int) -> None:
        """Begin to read the KV into `blocks`; the first `skip` of them have it already."""
        target, settled = tuple(blocks[skip:]), self._mark()
        if self._threads is None:
            self._ended.append(self._pull(incoming, target, skip, settled))
            return
        self._threads.submit(self._pull_aside, incoming, target, skip, settled)

    def finished_pulls(self) -> list[PullResult]:
        """Pulls that ended since the last call; never waits. `fileno` is unreadable afterwards."""
        if self._threads is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def fileno(self) -> int:
        """Readable when a pull has ended, until `finished_pulls`."""
        return self._wake_fd

    # --- both

    def reset(self, epoch: int) -> None:
        """Go on under a new epoch; what was offered is void, what peers read now fails."""
        if self._producer is not None:
            self._producer.reset(epoch)
        else:
            self._region.epoch = epoch
        self._region.bump(range(self._region.num_blocks))

    def close(self) -> None:
        """Stop serving; wait for pulls under way. The region's memory goes with its last view."""
        self._region.revoke()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for way in self._ways:
            way.close()
        self._region.close()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _pull_aside(
        self, incoming: Incoming, target: tuple[int, ...], skip: int, settled: fences.Wait
    ) -> None:
        self._ended.append(self._pull(incoming, target, skip, settled))
        os.eventfd_write(self._wake_fd, 1)

    def _pull(
        self, incoming: Incoming, target: tuple[int, ...], skip: int, settled: fences.Wait
    ) -> PullResult:
        """One read, proved; every failure becomes a result."""
        assert self._consumer is not None, "a prefill engine pulls nothing"
        try:
            settled()
            stats = self._consumer.pull(
                incoming.descriptor, target, skip_blocks=skip, timeout_s=self._timeout_s
            )
            incoming.descriptor.prove_tokens(incoming.prompt_token_ids)
        except Exception as error:
            if not isinstance(error, KVTransferError):
                logger.exception("the pull of %s failed", incoming.handoff_id)
            return PullResult(incoming.handoff_id, code=type(error).__name__, message=str(error))
        return PullResult(incoming.handoff_id, stats.num_bytes, stats.seconds, stats.transport)


def joined_handoff(key: str, own: KVDescriptor, others: Sequence[bytes] = ()) -> Handoff:
    """A hand-off of what rank 0 and the others have pinned of one prompt."""
    whole = own
    if others:
        whole = merge_parts([own, *(KVDescriptor.from_json(text) for text in others)])
    return Handoff(key, whole.id, whole.to_json(), whole.num_bytes)


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    """The hash that a descriptor proves its prompt by, as bytes."""
    return bytes.fromhex(token_hash(token_ids))
