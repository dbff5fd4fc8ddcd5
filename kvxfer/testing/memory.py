"""Bytes of regions as tests see them, wherever the blocks lie."""

from __future__ import annotations

from kvxfer import DeviceRegion, Region


def read_block(region: Region, block_id: int) -> bytes:
    """The bytes of one block, after everything that was asked of its device before."""
    return bytes(region.block(block_id))


def write_block(region: Region, block_id: int, data: bytes) -> None:
    """All bytes of one block; they are there when it returns. Bump the block before."""
    if not isinstance(region, DeviceRegion):
        region.block(block_id)[:] = data
        return
    import torch

    at = block_id * region.block_bytes
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    region.tensor[at : at + region.block_bytes].copy_(held)
    if region.tensor.is_cuda:
        torch.cuda.synchronize(region.tensor.device)
