"""A model side that remembers which token lies in which slot, and transfers between two of them.

The next token is a hash of everything that the block table leads to; so any wrong block, stale
slot or missed copy gives another output than `expected_output`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.blocks import BlockPool
from pdbatch.engine.engine import Engine
from pdbatch.engine.messages import Adoption, EngineInfo, Handoff
from pdbatch.engine.model_input import ModelInput, SampledToken, SamplingState
from pdbatch.engine.payload import HandoffPayload, encode_payload, unpack_tokens
from pdbatch.engine.ports import Incoming, PullRefused, PullResult
from pdbatch.engine.stepper import ModelSide
from pdbatch.engine.tokenizer import PromptError
from pdbatch.request import RequestSpec
from pdbatch.sampling import SamplingParams

VOCAB = 50
EOS = 49


def next_token(tokens: Sequence[int], seed: int, index: int) -> int:
    data = f"{list(tokens)}/{seed}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big") % VOCAB


def expected_output(
    prompt: Sequence[int], params: SamplingParams, seed: int, index: int, most: int
):
    """Token ids that any correct engine gives."""
    tokens = list(prompt)
    for count in range(1, most + 1):
        tokens.append(next_token(tokens, seed, index))
        armed = count > params.min_tokens
        if armed and (tokens[-1] == EOS and not params.ignore_eos):
            break
        if armed and tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


class FakeModel:
    """Runner, sampler and cache in one."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        self.steps = 0
        self.guesses = False
        """Whether some tokens on the device are wrong guesses, which a fetch corrects."""
        self.unfinished: dict[int, set[int]] = {}
        """By step that nobody has waited for yet: the blocks that it writes."""
        self.scheduled: list[int] = []

    def execute(self, batch: ModelInput):
        self.steps += 1
        ids, positions = batch.input_ids_T.tolist(), batch.positions_T.tolist()
        ids = [token if token >= 0 else batch.tokens_before[-1 - token] for token in ids]
        slots = batch.slot_mapping_T.tolist()
        self.unfinished[self.steps] = {slot // self.block_size for slot in slots}
        assert len(set(slots)) == len(slots) == len(ids) == len(positions)
        self.scheduled.append(len(ids))
        for token, position, slot in zip(ids, positions, slots, strict=True):
            self.slots[slot] = (token, position)
        assert batch.cu_seqlens_q[: batch.num_decodes + 1] == list(range(batch.num_decodes + 1))
        return Rows([self._context(batch, at) for at in batch.logits_indices])

    def _context(self, batch: ModelInput, at: int) -> list[int]:
        table = batch.block_tables_SM[at].tolist()
        tokens = []
        for position in range(batch.context_lens[at]):
            block, offset = divmod(position, self.block_size)
            slot = self.slots[table[block] * self.block_size + offset]
            assert slot is not None and slot[1] == position, f"row {at}: {slot} at {position}"
            tokens.append(slot[0])
        return tokens

    def choose(
        self,
        logits: Rows,
        states: Sequence[SamplingState],
        rows: Sequence[int] | None = None,
    ) -> FakeChoice:
        picked = logits.rows if rows is None else [logits.rows[row] for row in rows]
        assert len(picked) == len(states)
        chosen = []
        for tokens, state in zip(picked, states, strict=True):
            known = state.prompt_token_ids + state.output_token_ids
            assert tokens[: len(known)] == known
            assert len(tokens) == len(state.prompt_token_ids) + state.position
            chosen.append(next_token(tokens, state.seed, state.output_index))
        wrong = [row for row, token in enumerate(chosen) if self.guesses and token % 7 == 0]
        told = [VOCAB - 1 - token if row in wrong else token for row, token in enumerate(chosen)]
        return FakeChoice(told, chosen, wrong)

    def mark(self):
        """As `fences.Mark`: what was launched up to here is over when the wait returns."""
        step = self.steps

        def wait() -> None:
            for other in [other for other in self.unfinished if other <= step]:
                del self.unfinished[other]

        return wait

    def copy_blocks(self, src: Sequence[int], dst: Sequence[int]) -> None:
        size = self.block_size
        for a, b in zip(src, dst, strict=True):
            self.slots[b * size : (b + 1) * size] = self.slots[a * size : (a + 1) * size]


@dataclass
class Rows:
    rows: list[list[int]]


@dataclass
class FakeChoice:
    """Tokens that are known here when they are fetched."""

    tokens: list[int]
    right: list[int]
    wrong: list[int]
    corrected: list[int] = field(default_factory=list)

    def fetch(self) -> list[SampledToken]:
        self.corrected = self.wrong
        return [SampledToken(token, -1.0) for token in self.right]


class FakeTokenizer:
    """Token ids in, letters out."""

    def encode(self, spec: RequestSpec) -> list[int]:
        if spec.prompt_token_ids is None:
            raise PromptError("token ids only", param="prompt")
        return list(spec.prompt_token_ids)

    def token_text(self, token_id: int) -> str:
        return chr(ord("A") + token_id)

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> FakeDetokenizer:
        return FakeDetokenizer()


class FakeDetokenizer:
    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("A") + token) for token in token_ids)

    def flush(self) -> str:
        return ""


@dataclass
class Published:
    """What a fake descriptor names."""

    model: FakeModel
    blocks: list[int]
    generations: list[int]
    pool_generations: list[int]
    payload: HandoffPayload


@dataclass
class FakeTransfers:
    """Pulls end when the test says so (`end`), well or badly."""

    model: FakeModel
    generations: list[int]
    published: dict[str, Published]
    """Shared by all engines of a test."""
    offered: set[str] = field(default_factory=set)
    pulling: dict[str, tuple[Incoming, list[int], int]] = field(default_factory=dict)
    ended: list[PullResult] = field(default_factory=list)
    at_once: bool = False
    epoch: int = 0
    read_blocks: int = 0

    def pin(self, handoff_id, blocks, prompt, payload) -> Handoff:
        assert unpack_tokens(payload.prompt) == prompt
        writing = set().union(*self.model.unfinished.values())
        assert writing.isdisjoint(blocks), "a block that a step in flight writes is offered"
        self.offered.add(handoff_id)
        self.published[handoff_id] = Published(
            self.model,
            list(blocks),
            [self.generations[b] for b in blocks],
            self.generations,
            payload,
        )
        return Handoff(payload.key, handoff_id, encode_payload(payload), len(blocks))

    def unpin(self, handoff_id) -> None:
        self.offered.remove(handoff_id)

    def read(self, adoption: Adoption) -> Incoming:
        if adoption.handoff_id not in self.published:
            raise PullRefused("Revoked", "not published", "")
        payload = self.published[adoption.handoff_id].payload
        return Incoming(adoption.handoff_id, payload, unpack_tokens(payload.prompt), None)

    def start_pull(self, incoming, blocks, skip) -> None:
        assert skip < len(blocks)
        self.pulling[incoming.handoff_id] = (incoming, list(blocks), skip)
        if self.at_once:
            self.end(incoming.handoff_id, ok=True)

    def end(self, handoff_id: str, *, ok: bool) -> None:
        """Finish one pull; stale generations fail whatever `ok` says."""
        _incoming, blocks, skip = self.pulling.pop(handoff_id)
        source, size = self.published[handoff_id], self.model.block_size
        for a, b in list(zip(source.blocks, blocks, strict=True))[skip:]:
            content = source.model.slots[a * size : (a + 1) * size]
            self.model.slots[b * size : (b + 1) * size] = content
        self.read_blocks += len(blocks) - skip
        now = [source.pool_generations[block] for block in source.blocks]
        code = None if ok and now == source.generations else "StaleGeneration"
        self.ended.append(PullResult(handoff_id, len(blocks) - skip, code=code))

    def finished_pulls(self) -> list[PullResult]:
        ended, self.ended = self.ended, []
        return ended

    def reset(self, epoch: int) -> None:
        self.epoch = epoch
        self.model.unfinished.clear()  # what takes blocks now waits for the stream

    def fileno(self) -> int:
        return -1

    def close(self) -> None: ...


@dataclass
class FakeEngine:
    """An engine and its fakes."""

    engine: Engine
    model: FakeModel
    transfers: FakeTransfers
    blocks: BlockManager


def make_engine(
    role: str = "mixed",
    *,
    num_blocks: int = 32,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 100,
    pinned_share: float = 0.5,
    prefix_caching: bool = True,
    published: dict[str, Published] | None = None,
    run_ahead: bool = False,
    guesses: bool = False,
    ranks: Any = None,
    foresees: bool = True,
) -> FakeEngine:
    """Without `foresees` a sequence starts when it finds blocks, so that many are preempted."""
    model = FakeModel(num_blocks, block_size)
    model.guesses = guesses
    generations = [0] * num_blocks

    def bump(blocks: Sequence[int]) -> None:
        writing = set().union(*model.unfinished.values())
        assert writing.isdisjoint(blocks), "a block that a step in flight writes is taken"
        for block in blocks:
            generations[block] += 1
            for slot in range(block * block_size, (block + 1) * block_size):
                model.slots[slot] = None

    pool = BlockPool(num_blocks, bump)
    blocks = BlockManager(pool, block_size, prefix_caching=prefix_caching, root=b"fake")
    transfers = FakeTransfers(model, generations, published if published is not None else {})
    side = ModelSide(
        runner=model, sampler=model, cache=model, tokenizer=FakeTokenizer(), eos_token_ids=(EOS,)
    )
    info = EngineInfo(
        model="fake",
        role=role,
        device="cpu",
        dtype="none",
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        block_bytes=1,
        layout="fake",
        transports=[],
        pid=os.getpid(),
    )
    engine = Engine(
        side,
        blocks,
        transfers,
        info=info,
        role=role,  # type: ignore[arg-type]
        worker=role,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        pinned_share=pinned_share,
        run_ahead=run_ahead,
        mark=model.mark,
        ranks=ranks,
    )
    engine.scheduler.foresees &= foresees
    return FakeEngine(engine, model, transfers, blocks)
