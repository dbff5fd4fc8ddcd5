"""Blocks: who holds them, what can be found in them, what is said when the accounts are wrong."""

from __future__ import annotations

import random

import pytest

from pdbatch.engine.block_hashes import BlockHasher
from pdbatch.engine.block_manager import BlockManager
from pdbatch.engine.blocks import BlockHash, BlockPool
from pdbatch.engine.sequence import ActiveRequest, Sequence
from pdbatch.errors import InvariantError
from pdbatch.sampling import SamplingParams


def sequence(prompt: list[int], arrival: int = 0) -> Sequence:
    request = ActiveRequest(
        key=f"k{arrival}",
        arrival=arrival,
        priority=0,
        params=SamplingParams(),
        prompt_token_ids=prompt,
        seed=0,
        eos_token_ids=frozenset(),
        max_tokens=10,
        now_s=0.0,
    )
    return request.sequences[0]


def manager(num_blocks: int = 8, **changes) -> BlockManager:
    return BlockManager(BlockPool(num_blocks), 4, **changes)


def computed(blocks: BlockManager, one: Sequence) -> Sequence:
    assert blocks.admit(one)
    blocks.commit(one, one.num_tokens)
    one.num_computed_tokens = one.num_tokens
    return one


def test_the_oldest_free_content_goes_first_and_a_prefix_outlives_its_tail() -> None:
    blocks = manager(6)
    first = computed(blocks, sequence(list(range(12))))
    table = list(first.block_table)
    blocks.free(first)
    assert blocks.pool.num_free == 6 and blocks.pool.num_cached == 3
    blocks.pool.take(4)  # three plain ones, then the least recently used: the tail
    found = blocks.find_prompt(sequence(list(range(12))))
    assert found == table[:2]


def test_a_found_prefix_never_covers_the_last_token() -> None:
    blocks = manager()
    blocks.free(computed(blocks, sequence(list(range(8)))))
    again = sequence(list(range(8)))
    assert blocks.admit(again)
    assert again.num_computed_tokens == 4
    longer = sequence(list(range(9)), arrival=1)
    assert blocks.admit(longer)
    assert longer.num_computed_tokens == 8


def test_equal_tokens_after_another_prefix_are_another_content() -> None:
    blocks = manager()
    blocks.free(computed(blocks, sequence([1, 1, 1, 1, 2, 2, 2, 2])))
    assert blocks.find_prompt(sequence([2, 2, 2, 2])) == []
    assert blocks.find_prompt(sequence([1, 1, 1, 2])) == []
    other_model = BlockManager(blocks.pool, 4, root=b"another layout")
    assert other_model.find_prompt(sequence([1, 1, 1, 1])) == []


def test_admission_counts_cached_blocks_that_it_revives() -> None:
    blocks = manager(4)
    blocks.free(computed(blocks, sequence(list(range(16)))))
    assert blocks.pool.num_cached == 4
    assert not blocks.admit(sequence([*range(12), *range(50, 58)]))  # 3 found and 2 new of 4
    assert blocks.pool.num_free == 4
    assert blocks.admit(sequence([*range(12), 50, 51]))
    assert blocks.pool.num_free == 0


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = manager(prefix_caching=False)
    blocks.free(computed(blocks, sequence(list(range(8)))))
    assert blocks.pool.num_cached == 0
    assert blocks.find_prompt(sequence(list(range(8)))) == []


def test_a_fork_shares_full_blocks_and_copies_the_last() -> None:
    blocks = manager()
    parent = computed(blocks, sequence(list(range(10))))
    child = Sequence(parent.request, 1)
    assert blocks.fork(parent, child) == (parent.block_table[2], child.block_table[2])
    assert child.block_table[:2] == parent.block_table[:2]
    blocks.check([parent.block_table, child.block_table])
    blocks.free(parent)
    blocks.check([child.block_table])
    even = computed(blocks, sequence(list(range(20, 28)), arrival=1))
    twin = Sequence(even.request, 1)
    assert blocks.fork(even, twin) is None
    assert twin.block_table == even.block_table
    assert twin.block_table is not even.block_table


def test_generations_are_bumped_before_content_changes() -> None:
    bumped: list[int] = []
    pool = BlockPool(3, bumped.extend)
    taken = pool.take(2)
    pool.register(taken[0], BlockHash(b"x"))
    pool.release(taken)
    assert bumped == taken
    pool.share([taken[0]])
    assert bumped == taken, "shared content is not new content"
    pool.take(2)
    assert len(bumped) == 4


def test_wrong_accounts_are_told_with_numbers() -> None:
    pool = BlockPool(4)
    held = pool.take(2)
    pool.check([held])
    with pytest.raises(InvariantError, match=r"block \d has 1 references and 0 holders"):
        pool.check([held[:1]])
    with pytest.raises(InvariantError, match="3 blocks taken of 2 free"):
        pool.take(3)
    pool.release(held)
    with pytest.raises(InvariantError, match="released with no reference"):
        pool.release(held[:1])
    pool._plain.pop()
    with pytest.raises(InvariantError, match=r"free 3 \+ cached 0 \+ used 0 != total 4"):
        pool.check([])


def test_hashes_do_not_depend_on_what_was_hashed_before() -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")  # shown when the test fails
    rng = random.Random(seed)
    hasher, past = BlockHasher(4, b"root"), [[]]
    for _ in range(300):
        start = rng.choice(past)
        own = [rng.randrange(3) for _ in range(rng.randrange(30))]
        tokens = start[: rng.randrange(len(start) + 1)] + own
        tokens = tokens[: len(tokens) // 4 * 4]
        past.append(tokens)
        hashes: list[BlockHash] = []
        first = rng.randrange(len(tokens) // 4 + 1) * 4
        hasher.extend(hashes, tokens[:first])
        hasher.extend(hashes, tokens[first:])
        alone: list[BlockHash] = []
        BlockHasher(4, b"root").extend(alone, tokens)
        assert hashes == alone and len(alone) == len(tokens) // 4


def test_equal_hashes_mean_equal_beginnings() -> None:
    hasher = BlockHasher(2, b"")
    made: list[list[BlockHash]] = [[], [], []]
    for hashes, tokens in zip(made, ([1, 2, 3, 4], [1, 2, 3, 5], [3, 4, 1, 2]), strict=True):
        hasher.extend(hashes, tokens)
    assert made[0][0] == made[1][0] and made[0][1] != made[1][1]
    assert not set(made[2]) & set(made[0]), "a block's place counts"
    other: list[BlockHash] = []
    BlockHasher(2, b"another layout").extend(other, [1, 2])
    assert other[0] != made[0][0]
