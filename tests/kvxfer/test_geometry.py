"""Ends that differ: plans against rows moved one by one, and what is refused before anything moves.

Hypothesis prints the example that fails; `@reproduce_failure` runs it again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import (
    BadDescriptor,
    KVDescriptor,
    KVLayout,
    KVPart,
    KVUsageError,
    LayoutMismatch,
    MemTransport,
    PoolExhausted,
    ShmTransport,
    Span,
    Transport,
    merge_parts,
    plan_reads,
    token_hash,
)
from kvxfer.geometry import spans
from kvxfer.layout import Order
from kvxfer.testing.unequal import HOST, ORDERS, UnequalSuite, unequal_layout

TOKENS = 52


class Mover(UnequalSuite):
    """The suite's way to move and compare, over one transport."""

    def __init__(self, make: Callable[[], Transport]) -> None:
        self._make = make

    def make(self) -> Transport:
        return self._make()


MEM, SHM = Mover(MemTransport), Mover(lambda: ShmTransport(HOST))


@pytest.mark.parametrize("mover", [MEM, SHM], ids=["mem", "shm"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("theirs", [1, 2, 4])
@pytest.mark.parametrize("ours", [1, 2, 4])
@given(
    block_sizes=st.tuples(*[st.sampled_from([1, 8, 16, 24, 32, 64])] * 2),
    heads=st.sampled_from([1, 2, 4, 8]),
    layers=st.integers(1, 3),
    row_bytes=st.sampled_from([2, 6, 16]),
    tokens=st.integers(1, 130),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None, print_blob=True)
def test_any_two_ends(
    mover: Mover,
    order: Order,
    theirs: int,
    ours: int,
    block_sizes: tuple[int, int],
    heads: int,
    layers: int,
    row_bytes: int,
    tokens: int,
    seed: int,
) -> None:
    layout = unequal_layout(order, 1, heads=heads, row_bytes=row_bytes, layers=layers)
    tokens = min(tokens, 40 * min(block_sizes))
    mover.move(random.Random(seed), layout, (theirs, ours), block_sizes, tokens)


def described(layout: KVLayout, tokens: int = TOKENS, **changes: object) -> KVDescriptor:
    """What a rank with this layout would say."""
    count = -(-tokens // layout.block_size)
    part = KVPart(
        rank=layout.tp_rank,
        epoch=1,
        block_ids=tuple(range(100, 100 + count)),
        generations=tuple(range(count)),
        endpoints={"mem": {"region": "x"}},
        checksums=(1, 2**32 - 1),
    )
    values = {
        "id": "x",
        "producer": f"p#{layout.tp_rank}",
        "host": HOST,
        "layout": layout.fingerprint,
        "block_size": layout.block_size,
        "tp_size": layout.tp_size,
        "parts": (part,),
        "num_tokens": tokens,
        "token_hash": token_hash(range(tokens)),
        "num_bytes": count * layout.block_bytes,
        "payload": b"\x00\xff",
    }
    return KVDescriptor(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
def test_equal_ends_cost_nothing(order: Order) -> None:
    """One span for all blocks, and no row is looked at."""
    spans.cache_clear()
    for tp_size in (1, 2):
        layout = unequal_layout(order, 16, tp_size, tp_size - 1)
        ((index, plan),) = plan_reads(described(layout), layout, [7, 5], 2)
        assert (index, plan.src_blocks, plan.is_whole) == (0, (102, 103), True)
        assert [move.pairs for move in plan.moves] == [((102, 7), (103, 5))]
    assert spans.cache_info().misses == 0


def test_neighbours_are_read_in_one_piece() -> None:
    """Two ranks of a head-major pool: one piece for each plane; of a token-major one, for each
    token too. Half a block of all heads: likewise."""
    rank = {order: unequal_layout(order, 16, 2, 1) for order in ORDERS}
    whole = {order: unequal_layout(order, 16) for order in ORDERS}
    planes, row = whole["head_major"].num_planes, whole["head_major"].row_bytes
    for order, count in (("head_major", planes), ("token_major", planes * 16)):
        found = spans(whole[order], rank[order], range(2, 4), 0, 0, 16)
        assert len(found) == count
        assert sum(span.num_bytes for span in found) == rank[order].block_bytes
        assert found[0] == Span(
            2 * row * (16 if order == "head_major" else 1), 0, found[0].num_bytes
        )
    narrow = {order: unequal_layout(order, 8) for order in ORDERS}
    for order, count in (("head_major", planes * 4), ("token_major", planes)):
        assert len(spans(whole[order], narrow[order], range(4), 8, 0, 8)) == count


def test_readers_that_share_a_head_ask_different_ranks() -> None:
    sources = [unequal_layout("head_major", 16, 4, rank, heads=2) for rank in range(4)]
    found = merge_parts([described(layout) for layout in sources])
    into = [0, 1, 2, 3]
    asked = [
        [index for index, _ in plan_reads(found, replace(layout, tp_rank=rank), into)]
        for rank, layout in enumerate(sources)
    ]
    assert asked == [[0], [1], [2], [3]]
    alone = unequal_layout("head_major", 16, heads=2)
    assert [index for index, _ in plan_reads(found, alone, into)] == [0, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"model": "other"},
        {"order": "token_major"},
        {"num_layers": 3},
        {"num_kv_heads": 8},
        {"head_dim": 6},
        {"itemsize": 4},
    ],
)
def test_another_model_dtype_shape_or_order_is_refused(change: dict[str, object]) -> None:
    layout = unequal_layout("head_major", 16)
    with pytest.raises(LayoutMismatch):
        plan_reads(described(replace(layout, **change)), layout, [0, 1, 2, 3])  # type: ignore[arg-type]


def test_ranks_and_block_sizes_are_no_part_of_the_fingerprint() -> None:
    layout = unequal_layout("head_major", 16)
    assert layout.of(block_size=64, tp_size=4, tp_rank=3).fingerprint == layout.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"tp_size": 3},
        {"tp_size": 2, "tp_rank": 2},
        {"tp_rank": -1},
        {"block_size": 0},
        {"order": "layer_major"},
    ],
)
def test_layouts_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(LayoutMismatch):
        replace(unequal_layout("head_major", 16), **change)  # type: ignore[arg-type]


def test_blocks_are_counted_in_the_readers_size() -> None:
    theirs, ours = unequal_layout("head_major", 16), unequal_layout("head_major", 8)
    found = described(theirs)
    for skip, count in ((0, 6), (0, 8), (7, 1), (3, 5)):
        with pytest.raises(PoolExhausted):
            plan_reads(found, ours, range(count), skip)
    assert plan_reads(found, ours, [], 7) == plan_reads(found, ours, [], 9) == []
    ((_, plan),) = plan_reads(found, ours, [3, 1], 5)
    assert plan.src_blocks == (102, 103)
    assert plan.num_bytes == (TOKENS - 40) * ours.block_bytes // 8
    with pytest.raises(KVUsageError):
        plan_reads(found, ours, range(8), -1)


# --- descriptors


def test_a_descriptor_survives_its_journey() -> None:
    ranks = [described(unequal_layout("head_major", 16, 2, rank)) for rank in (1, 0)]
    found = merge_parts(ranks)
    assert KVDescriptor.from_json(found.to_json()) == found
    assert [part.rank for part in found.parts] == [0, 1]
    assert (found.producer, found.num_bytes) == ("p#0", 2 * ranks[0].num_bytes)


def test_descriptors_of_other_versions_are_refused() -> None:
    values = json.loads(described(unequal_layout("head_major", 16)).to_json())
    old = {name: value for name, value in values.items() if name not in ("version", "parts")}
    old |= {"epoch": 1, "block_ids": [1], "generations": [0], "endpoints": {}}
    with pytest.raises(BadDescriptor, match="version 1, this kvxfer reads 2"):
        KVDescriptor.from_json(json.dumps(old))
    with pytest.raises(BadDescriptor, match="version 3"):
        KVDescriptor.from_json(json.dumps({**values, "version": 3}))


@pytest.mark.parametrize(
    "change",
    [
        {"parts": []},
        {"parts": None},
        {"tp_size": 0},
        {"block_size": 0},
        {"block_size": 8},
        {"num_tokens": 1},
        {"num_tokens": -1},
        {"payload": "no base64!"},
        {"another": 1},
        {"layout": None},
    ],
)
def test_what_is_no_descriptor_is_refused(change: dict[str, object]) -> None:
    values = json.loads(described(unequal_layout("head_major", 16)).to_json())
    with pytest.raises(BadDescriptor):
        KVDescriptor.from_json(json.dumps({**values, **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 1},
        {"rank": -1},
        {"rank": "0"},
        {"epoch": None},
        {"block_ids": [1, 2, 3]},
        {"block_ids": [1, 2, 3, -4]},
        {"block_ids": [1, 2, 3, 4.0]},
        {"generations": [0, 0, 0]},
        {"endpoints": []},
        {"endpoints": {"mem": 1}},
        {"checksums": "AAA="},
        {"checksums": [1]},
        {"another": 1},
    ],
)
def test_what_is_no_part_is_refused(change: dict[str, object]) -> None:
    values = json.loads(described(unequal_layout("head_major", 16)).to_json())
    (part,) = values["parts"]
    for parts in ([{**part, **change}], [{**part, "rank": 0}, {**part, "rank": 0}], ["x"], "x"):
        with pytest.raises(BadDescriptor):
            KVDescriptor.from_json(json.dumps({**values, "parts": parts}))
    with pytest.raises(BadDescriptor):
        KVDescriptor.from_json(json.dumps([values]))


def test_ranks_that_do_not_belong_together_are_not_merged() -> None:
    first, second = (unequal_layout("head_major", 16, 2, rank) for rank in range(2))
    for descriptors in (
        [],
        [described(first)],
        [described(first), described(first)],
        [described(first), described(second), described(second)],
        [described(first), described(second, 51)],
        [described(first), described(second, host="elsewhere")],
        [described(first), described(replace(second, model="other"))],
        [described(first), described(replace(second, block_size=13))],
    ):
        with pytest.raises(KVUsageError):
            merge_parts(descriptors)
