"""What a worker's main process and its engine process say to each other.

Frames on a Unix socket pair: 4 bytes of length (big-endian), then msgpack of one
`Command` (main to engine) or one `Event` (engine to main). Each message carries a
list where it can, so that one frame serves a whole shard.

    main ──Submit, Adopt, Unpin, Abort, Reset, Drain, Shutdown──► engine
    main ◄──Ready, Finished, Prefilled, Pulled, PullFailed, Stats, Drained, Fatal── engine
"""

from __future__ import annotations

import msgspec

from pdbatch.request import RequestOutput, RequestSpec


class EngineRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request for the engine."""

    key: str
    """`pdbatch.ids.RequestKey`; unique among the requests in the engine."""
    spec: RequestSpec
    priority: int = 0
    """Smaller runs first; equals run in order of arrival."""


# --- main to engine


class Submit(msgspec.Struct, tag=True):
    """Run these from the start. A prefill engine hands them off; a mixed one finishes them."""

    requests: list[EngineRequest]


class Adoption(msgspec.Struct):
    """A claimed descriptor that the engine is to pull and then decode."""

    handoff_id: str
    descriptor: bytes
    """`kvxfer.KVDescriptor.to_json()`; its payload holds the request and its first token."""


class Adopt(msgspec.Struct, tag=True):
    """Pull and decode these. Each is answered in `Pulled` or in `PullFailed`, unless a `Reset`
    or a `Drain` drops it first. One that can never fit is answered by `Pulled` and its error."""

    items: list[Adoption]


class Unpin(msgspec.Struct, tag=True):
    """These handoffs are over (pulled, failed or withdrawn): free their blocks."""

    handoff_ids: list[str]


class Abort(msgspec.Struct, tag=True):
    """Drop these requests wherever they are, pinned ones too; no output follows.

    Adoptions that were not pulled yet are answered by `PullFailed` with code `Aborted`."""

    keys: list[str]


class Reset(msgspec.Struct, tag=True):
    """Drop everything, unpin everything and go on under this epoch (the worker was fenced)."""

    epoch: int


class Drain(msgspec.Struct, tag=True):
    """Finish what runs; drop what has not begun, and what is submitted meanwhile. Answered by
    `Drained` once nothing runs; what is pinned stays until it is unpinned."""


class Shutdown(msgspec.Struct, tag=True):
    """Free everything, check the block accounts, exit."""


Command = Submit | Adopt | Unpin | Abort | Reset | Drain | Shutdown

# --- engine to main


class EngineInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What the engine turned out to be, for Flower and for claims."""

    model: str
    role: str
    device: str
    dtype: str
    max_model_len: int
    block_size: int
    num_blocks: int
    block_bytes: int
    layout: str
    """Fingerprint of the KV layout; only equal ones can hand over."""
    transports: list[str]
    """Ways for KV that are open, best first."""
    pid: int
    gpu: str = ""
    """The UUID of its GPU: `cuda:0` is another one in each process."""
    listen_host: str = ""
    """Where peers of other machines would reach it."""


class Ready(msgspec.Struct, tag=True):
    """The model is loaded and warm; commands are taken from now on."""

    info: EngineInfo


class Finished(msgspec.Struct, tag=True):
    """These requests ended, well or badly."""

    outputs: list[RequestOutput]


class Handoff(msgspec.Struct):
    """A prefilled request, pinned and ready to be published."""

    key: str
    handoff_id: str
    descriptor: bytes
    num_bytes: int


class Prefilled(msgspec.Struct, tag=True):
    """These are pinned; publish them."""

    handoffs: list[Handoff]


class Pulled(msgspec.Struct, tag=True):
    """The KV of these is here and proved right; release them at the producer."""

    handoff_ids: list[str]


class PullFailed(msgspec.Struct, tag=True):
    """One pull did not end in proven KV; nothing of it will be decoded."""

    handoff_id: str
    key: str
    code: str
    """The kvxfer error's class name: `StaleEpoch`, `PeerLost`, `LayoutMismatch`, …; or
    `Aborted`, or `Duplicate` (the request is in this engine already)."""
    message: str


class Stats(msgspec.Struct, tag=True, kw_only=True):
    """Every `EngineConfig.stats_interval_s`, and after each change of idle to busy."""

    waiting: int
    running: int
    pulling: int
    pinned_requests: int
    free_blocks: int
    cached_blocks: int
    """Free, and holding a prefix that can be found again (counted within free_blocks)."""
    used_blocks: int
    total_blocks: int
    prompt_tokens: int
    """Cumulative, as all below."""
    cached_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    pulled_bytes: int
    held: bool = False
    """Whether nobody starts now, free blocks or not: those that run are foreseen to need them."""


class Drained(msgspec.Struct, tag=True):
    """Answer to `Drain`: the keys that were dropped unfinished, adoptions not begun included."""

    dropped: list[str]


class Fatal(msgspec.Struct, tag=True):
    """The engine cannot go on; its process exits after this."""

    error: str
    message: str


Event = Ready | Finished | Prefilled | Pulled | PullFailed | Stats | Drained | Fatal
