"""Sums that tell whether a block's bytes are those that its producer had.

Legend: N blocks, P planes (K or V of a layer), H heads of a rank, b tokens of a block, W words of
a row (its bytes as signed 32-bit numbers; narrower ones where a row is no multiple of 4 bytes).

There is one sum for each block and head, over the tokens of the prompt that are in the block:

    Σ over plane, token, word    word * a[plane, token, word] + (word >> 16) * c[plane, token, word]

modulo 2^32, with weights that are fixed and look random (a is odd). It goes by places in the
*producer's* block, so rows or blocks that changed places are noticed, and it is linear, so a reader
of other heads or block sizes adds it up from what came into its own blocks. A block that was read
in part only (the reader had its beginning already) is not covered. Whole numbers give the same on
every device. Damage goes unnoticed once in 4 billion times, in the worst case (the same bit of many
words) once in 130,000; it is no protection against somebody who means harm.

The sums are computed where the blocks lie, by torch, a tile at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kvxfer.descriptor import KVDescriptor
from kvxfer.errors import BadDescriptor, ChecksumMismatch, KVUsageError
from kvxfer.geometry import Cut, Take, cuts, takes
from kvxfer.layout import KVLayout
from kvxfer.region import DeviceRegion, Region

MODULUS = 1 << 32
_TILE_BYTES = {"cpu": 512 << 10}
"""What is worked on at once: little enough for a processor's cache …"""
_DEVICE_TILE_BYTES = 32 << 20
"""… and enough to keep a device busy."""
_own = threading.local()


def require_torch() -> None:
    """Raises KVUsageError where there is no torch."""
    if find_spec("torch") is None:
        raise KVUsageError("checksums are computed by torch, which is not installed")


def block_sums(
    region: Region, layout: KVLayout, block_ids: Sequence[int], num_tokens: int
) -> tuple[int, ...]:
    """Of each block, each head of the rank; the last block holds what is left of the tokens.

    Computed in order after what the current stream of the region's device was told before.
    """
    torch = import_module("torch")
    full, rest = divmod(num_tokens, layout.block_size)
    found = [
        _Sums(region, layout, layout.heads).of(blocks, 0, 0, tokens, layout.block_size)
        for blocks, tokens in ((block_ids[:full], layout.block_size), (block_ids[full:], rest))
        if blocks
    ]
    return _numbers(torch.cat(found)) if found else ()


def check(descriptor: KVDescriptor, layout: KVLayout) -> None:
    """Its sums can be verified. Raises BadDescriptor where they are not as many as there are blocks
    and heads, KVUsageError without torch."""
    require_torch()
    for take in takes(descriptor, layout):
        found, heads = len(descriptor.parts[take.part].checksums), len(take.source.heads)
        if found not in (0, descriptor.num_blocks * heads):
            raise BadDescriptor(f"{found} checksums for {descriptor.num_blocks} x {heads}")


def verify(
    descriptor: KVDescriptor,
    region: Region,
    layout: KVLayout,
    dst_block_ids: Sequence[int],
    skip_blocks: int = 0,
) -> None:
    """What was read into these blocks is what the producer had. Raises ChecksumMismatch.

    The arguments are those of the pull, which has ended.
    """
    pieces = cuts(descriptor, layout.block_size, dst_block_ids, skip_blocks)
    begin = -(-skip_blocks * layout.block_size // descriptor.block_size)
    with _stream_of_ours(str(_bytes_of(region).device)):
        for take in takes(descriptor, layout):
            expected = _expected(descriptor, take)
            if not expected:
                continue
            heads = len(take.heads)
            found = _numbers(_found(descriptor, region, layout, take, pieces))[begin * heads :]
            wrong = {
                begin + index // heads
                for index, (ours, theirs) in enumerate(
                    zip(found, expected[begin * heads :], strict=True)
                )
                if ours != theirs
            }
            if wrong:
                raise ChecksumMismatch(
                    f"{len(wrong)} of {descriptor.num_blocks - begin} blocks of {descriptor.id} "
                    f"came damaged from rank {take.source.tp_rank}, first block {min(wrong)}"
                )


def _expected(descriptor: KVDescriptor, take: Take) -> list[int]:
    """The producer's sums of the heads that are taken, block by block."""
    sums, of_rank = descriptor.parts[take.part].checksums, take.source.heads
    first = take.heads.start - of_rank.start
    return [
        sums[at + head]
        for at in range(0, len(sums), len(of_rank))
        for head in range(first, first + len(take.heads))
    ]


def _found(
    descriptor: KVDescriptor, region: Region, layout: KVLayout, take: Take, pieces: list[Cut]
) -> Any:
    """[blocks of the descriptor, heads] of what lies in our blocks."""
    torch = import_module("torch")
    sums = _Sums(region, layout, take.heads)
    shape = (descriptor.num_blocks, len(take.heads))
    total = torch.zeros(shape, dtype=torch.int32, device=sums.device)
    for cut in pieces:
        source = torch.tensor([index for index, _ in cut.pairs], device=sums.device)
        blocks = [block for _, block in cut.pairs]
        total[source] += sums.of(
            blocks, cut.src_token, cut.dst_token, cut.num_tokens, descriptor.block_size
        )
    return total


class _Sums:
    """Over some heads of one region."""

    def __init__(self, region: Region, layout: KVLayout, heads: range) -> None:
        torch = import_module("torch")
        words = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[_word_bytes(layout)]
        planes, per_rank, size = layout.num_planes, len(layout.heads), layout.block_size
        first = heads.start - layout.heads.start
        head_major = layout.order == "head_major"
        shape = (planes, per_rank, size) if head_major else (planes, size, per_rank)
        flat = _bytes_of(region)
        self.device = str(flat.device)
        if flat.data_ptr() % _word_bytes(layout):
            raise KVUsageError("checksums need blocks that begin at a multiple of 4 bytes")
        pool = flat.view(words).view(region.num_blocks, *shape, -1)
        by_head = pool if head_major else pool.transpose(2, 3)
        self._pool_NPHbW = by_head[:, :, first : first + len(heads)]

    def of(
        self,
        block_ids: Sequence[int],
        src_token: int,
        token: int,
        num_tokens: int,
        src_block_size: int,
    ) -> Any:
        """[blocks, heads]: the sums of `num_tokens` tokens from `token` on in each block, with the
        weights that they have from `src_token` on in a block of the producer's."""
        torch = import_module("torch")
        pool = self._pool_NPHbW[:, :, :, token : token + num_tokens]
        planes, heads = pool.shape[1:3]
        weights = [
            table[:, None, src_token : src_token + num_tokens]
            for table in _weights(planes, src_block_size, pool.shape[-1], self.device)
        ]
        plane_bytes = 4 * heads * num_tokens * pool.shape[-1]
        room = max(1, _TILE_BYTES.get(self.device, _DEVICE_TILE_BYTES) // plane_bytes)
        at_once, blocks = min(planes, room), max(1, room // planes)
        sums = torch.zeros((len(block_ids), heads), dtype=torch.int32, device=self.device)
        ids = torch.tensor(block_ids, device=self.device)
        for first in range(0, len(block_ids), blocks):
            part = slice(first, first + blocks)
            tile = pool[ids[part]] if blocks > 1 else pool[block_ids[first]].unsqueeze(0)
            for plane in range(0, planes, at_once):
                some = slice(plane, plane + at_once)
                sums[part] += _weighted(tile[:, some], *(table[some] for table in weights))
        return sums


def _weighted(tile: Any, a: Any, c: Any) -> Any:
    """[N, H] of a tile [N, P, H, b, W]."""
    torch = import_module("torch")
    words = tile if tile.dtype is torch.int32 else tile.to(torch.int32)
    product = torch.mul(words, a)
    product.addcmul_(words >> 16, c)
    return product.sum((3, 4), dtype=torch.int32).sum(1, dtype=torch.int32)


@lru_cache(maxsize=8)
def _weights(planes: int, block_size: int, words: int, device: str) -> tuple[Any, Any]:
    """a and c, [P, b, W] each: a hash of the place, as good in its low bits as in its high ones."""
    torch = import_module("torch")
    place = torch.arange(planes * block_size * words, dtype=torch.int64)
    found = []
    for number in (1, 2):
        x = (place * 2 + number) * 0x9E3779B1 % MODULUS
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = (x ^ (x >> shift)) * factor % MODULUS
        x ^= x >> 15
        if number == 1:
            x |= 1
        signed = torch.where(x >= MODULUS // 2, x - MODULUS, x).to(torch.int32)
        found.append(signed.view(planes, block_size, words).to(device))
    return found[0], found[1]


def _word_bytes(layout: KVLayout) -> int:
    return next(size for size in (4, 2, 1) if layout.row_bytes % size == 0)


def _bytes_of(region: Region) -> Any:
    torch = import_module("torch")
    if isinstance(region, DeviceRegion):
        return region.tensor
    return torch.frombuffer(region.buffer, dtype=torch.uint8)


def _numbers(sums: Any) -> tuple[int, ...]:
    return tuple(value % MODULUS for value in sums.flatten().tolist())


@contextmanager
def _stream_of_ours(device: str) -> Iterator[None]:
    """On a device what is done here waits for nothing that others told it; one for each thread."""
    if not device.startswith("cuda"):
        yield
        return
    torch = import_module("torch")
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        yield
