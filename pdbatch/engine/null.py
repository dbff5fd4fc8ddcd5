"""An engine without a model, for measuring everything else: constant tokens, at once.

Prompts are taken as bytes, four of them a token; an output has `max_tokens` tokens (2 if none are
asked for) and ends by length. The hand-off is the real one over real memory, with blocks of a few
kilobytes: a prefill engine fills them from the hash of the prompt, a decode engine pulls and
proves them and compares the bytes, so `kv_checksum` changes nothing. No torch, no tokenizer, no
threads.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from pdbatch.engine.blocks import BlockId, BlockPool
from pdbatch.engine.config import EngineConfig
from pdbatch.engine.events import Outbox
from pdbatch.engine.handoff import KVLayout, KVTransfers, Region, prompt_hash
from pdbatch.engine.messages import (
    Abort,
    Adopt,
    Adoption,
    Command,
    Drain,
    Drained,
    EngineInfo,
    EngineRequest,
    Event,
    Reset,
    Shutdown,
    Stats,
    Submit,
    Unpin,
)
from pdbatch.engine.outputs import failure
from pdbatch.engine.payload import FirstToken, HandoffPayload, pack_tokens, unpack_tokens
from pdbatch.engine.ports import PullRefused
from pdbatch.errors import InvariantError
from pdbatch.request import (
    CompletionOutput,
    KVTransfer,
    RequestOutput,
    RequestSpec,
    StageTimes,
    Usage,
)
from pdbatch.sampling import SamplingParams

_BLOCK_TOKENS = 2048
_NUM_BLOCKS = 4096
_MODEL_LEN = 1 << 20
_TOKEN = 120
_TEXT = "x"
_FIRST = FirstToken(_TOKEN)


class NullEngine:
    """See the module and `pdbatch.engine.base.EngineBase`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        layout = KVLayout(
            model=f"null:{config.model}",
            dtype="uint8",
            itemsize=1,
            block_size=_BLOCK_TOKENS,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
        )
        num_blocks = config.num_blocks or _NUM_BLOCKS
        self._region = Region(num_blocks, layout.block_bytes, epoch=config.epoch)
        self._transfers: KVTransfers | None = None
        if config.role != "mixed":
            plain = replace(config, kv_checksum=False)
            self._transfers = KVTransfers(self._region, layout, plain, pull_threads=0)
        self._pool = BlockPool(num_blocks, self._region.bump)
        self._most_pinned = config.pinned_share * num_blocks
        self._waiting: deque[EngineRequest] = deque()
        self._pins: dict[str, list[BlockId]] = {}
        self._out = Outbox()
        self._life = os.urandom(4).hex()
        self._count = 0
        self.info = EngineInfo(
            model=config.model,
            role=config.role,
            device="cpu",
            dtype="none",
            max_model_len=_MODEL_LEN,
            block_size=_BLOCK_TOKENS,
            num_blocks=num_blocks,
            block_bytes=layout.block_bytes,
            layout=layout.fingerprint,
            transports=self._transfers.transports if self._transfers else [],
            pid=os.getpid(),
            listen_host=config.listen_host,
        )

    # --- commands

    def handle(self, command: Command) -> None:
        """Take a command; what it causes comes out of the next step."""
        match command:
            case Submit(requests=requests):
                self._waiting.extend(requests)
            case Adopt(items=items):
                for item in items:
                    self._adopt(item)
            case Unpin(handoff_ids=ids):
                self._unpin(ids)
            case Abort(keys=keys):
                self._abort(set(keys))
            case Reset(epoch=epoch):
                self._waiting.clear()
                self._unpin(list(self._pins))
                self._out.clear()
                if self._transfers is not None:
                    self._transfers.reset(epoch)
            case Drain():
                self._out.other.append(Drained([request.key for request in self._waiting]))
                self._waiting.clear()
            case Shutdown():
                raise InvariantError("Shutdown is for the process, not for the engine")

    def _abort(self, keys: set[str]) -> None:
        self._waiting = deque(r for r in self._waiting if r.key not in keys)
        self._out.finished = [o for o in self._out.finished if o.key not in keys]
        self._unpin([i for i in self._pins if i.partition("/")[0] in keys])

    def _unpin(self, handoff_ids: Iterable[str]) -> None:
        for handoff_id in handoff_ids:
            blocks = self._pins.pop(handoff_id, None)
            if blocks is not None and self._transfers is not None:
                self._transfers.unpin(handoff_id)
                self._pool.release(blocks)

    # --- a step

    @property
    def busy(self) -> bool:
        """Whether there is something to tell."""
        return self._out.pending

    def step(self) -> list[Event]:
        """Run everything that waits, as far as blocks and pins allow."""
        self._out.steps += bool(self._waiting)
        while self._waiting and self._start(self._waiting[0]):
            self._waiting.popleft()
        return self._out.take()

    def stats(self) -> Stats:
        """Counts of now."""
        return Stats(
            waiting=len(self._waiting),
            running=0,
            pulling=0,
            pinned_requests=len(self._pins),
            free_blocks=self._pool.num_free,
            cached_blocks=0,
            used_blocks=self._pool.num_used,
            total_blocks=self._pool.num_blocks,
            prompt_tokens=self._out.prompt_tokens,
            cached_tokens=0,
            output_tokens=self._out.output_tokens,
            preemptions=0,
            steps=self._out.steps,
            pulled_bytes=self._out.pulled_bytes,
        )

    def fileno(self) -> int:
        """Nothing happens here that no command announces."""
        return -1

    def check(self) -> None:
        """Only pins hold blocks. Raises InvariantError."""
        self._pool.check(self._pins.values())

    def close(self) -> None:
        """Stop serving peers."""
        if self._transfers is not None:
            self._transfers.close()

    # --- requests

    def _start(self, request: EngineRequest) -> bool:
        """Finish or hand off one request; False if there is no room for its pins."""
        sampling = request.spec.sampling
        prompt = _tokens(request.spec)
        if len(prompt) > self._pool.num_blocks * _BLOCK_TOKENS:
            self._refuse(request.key, len(prompt))
        elif self._transfers is None or _length(sampling) == 1:
            self._finish(request.key, sampling, len(prompt), StageTimes(), self._config.worker)
        elif not self._hand_off(request, prompt):
            return False
        self._out.prompt_tokens += len(prompt)
        return True

    def _hand_off(self, request: EngineRequest, prompt: list[int]) -> bool:
        assert self._transfers is not None
        count = -(-len(prompt) // _BLOCK_TOKENS)
        if count > self._pool.num_free or self._pool.num_used > self._most_pinned:
            return False
        blocks = self._pool.take(count)
        content = prompt_hash(prompt)
        for block in blocks:
            self._region.block(block)[: len(content)] = content
        self._count += 1
        handoff_id = f"{request.key}/{self._life}{self._count:x}"
        self._pins[handoff_id] = blocks
        sampling = request.spec.sampling
        payload = HandoffPayload(
            key=request.key,
            prompt=pack_tokens(prompt),
            sampling=sampling,
            seed=0,
            first=[_FIRST] * sampling.n,
            prefill_worker=self._config.worker,
            pinned_at=time.time(),
        )
        self._out.prefilled.append(self._transfers.pin(handoff_id, blocks, prompt, payload))
        return True

    def _adopt(self, item: Adoption) -> None:
        """Pull, prove, compare, finish: all at once."""
        key = item.handoff_id.partition("/")[0]
        try:
            if self._transfers is None:
                raise PullRefused("NoTransport", "this engine reads nobody's KV", key)
            incoming = self._transfers.read(item)
            count = -(-len(incoming.prompt_token_ids) // _BLOCK_TOKENS)
            if count > self._pool.num_blocks:
                raise PullRefused("PoolExhausted", f"{count} blocks are too many", key)
            blocks = self._pool.take(count)
            try:
                self._transfers.start_pull(incoming, blocks, 0)
                (ended,) = self._transfers.finished_pulls()
                if ended.code is not None:
                    raise PullRefused(ended.code, ended.message, key)
                self._compare(bytes.fromhex(incoming.descriptor.token_hash), blocks, key)
            finally:
                self._pool.release(blocks)
        except PullRefused as refused:
            self._out.pull_failed(item.handoff_id, refused.key or key, refused.code, str(refused))
            return
        payload = incoming.payload
        self._out.pulled.append(item.handoff_id)
        self._out.pulled_bytes += ended.num_bytes
        times = payload.times
        times.handoff_s = max(0.0, time.time() - payload.pinned_at - ended.seconds)
        times.transfer_s = ended.seconds
        prompt = len(incoming.prompt_token_ids)
        self._finish(
            payload.key, payload.sampling, prompt, times, payload.prefill_worker, ended.transfer
        )

    def _compare(self, content: bytes, blocks: list[BlockId], key: str) -> None:
        for block in blocks:
            if self._region.block(block)[: len(content)] != content:
                raise PullRefused("ChecksumMismatch", f"block {block} holds other bytes", key)

    def _refuse(self, key: str, prompt: int) -> None:
        message = f"the prompt has {prompt} tokens, more than all blocks hold; shorten it"
        self._out.finished.append(
            failure(key, "context_length_exceeded", message, worker=self._config.worker)
        )

    def _finish(
        self,
        key: str,
        sampling: SamplingParams,
        prompt: int,
        times: StageTimes,
        prefiller: str,
        transfer: KVTransfer | None = None,
    ) -> None:
        count = _length(sampling)
        outputs = [
            CompletionOutput(
                index=index,
                text=_TEXT * count,
                token_ids=[_TOKEN] * count,
                finish_reason="length",
            )
            for index in range(sampling.n)
        ]
        self._out.finished.append(
            RequestOutput(
                key=key,
                outputs=outputs,
                usage=Usage(prompt_tokens=prompt, completion_tokens=count * sampling.n),
                times=times,
                transfer=transfer,
                prefill_worker=prefiller,
                decode_worker=self._config.worker if self._config.role != "prefill" else "",
            )
        )
        self._out.output_tokens += count * sampling.n


def _length(sampling: SamplingParams) -> int:
    return 2 if sampling.max_tokens is None else sampling.max_tokens


def _tokens(spec: RequestSpec) -> list[int]:
    """Token ids as they are given, else the text's bytes, four a token."""
    if spec.prompt_token_ids is not None:
        return list(spec.prompt_token_ids)
    text = spec.prompt if spec.prompt is not None else str(spec.messages)
    data = text.encode("utf-8", "surrogatepass")
    return unpack_tokens(data + b" " * (-len(data) % 4 or (0 if data else 4)))
