"""Shared regions in large pages: where they lie, when they go, and a kernel that has none."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
from pathlib import Path

import pytest

from kvxfer import pages
from kvxfer.region import Region

LARGE = pages.LARGE_BYTES
BLOCK = 256 << 10


def mapped(region_id: str) -> int:
    """How often this process has the region mapped."""
    return Path("/proc/self/maps").read_text().count(f"memfd:kvxfer-{region_id}")


def large_bytes() -> int:
    """Of this process's shared memory."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"ShmemPmdMapped:\s+(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def test_mappings_begin_where_large_pages_do() -> None:
    fd = os.memfd_create("test")
    try:
        for size in (1, LARGE, 2 * LARGE, 5 * LARGE + 4096, 5 * LARGE + 17):
            os.ftruncate(fd, size)
            where = pages.map_shared(fd, size, writable=True)
            assert size < 2 * LARGE or where % LARGE == 0
            ctypes.memset(where, 3, size)
            assert os.pread(fd, 1, size - 1) == b"\3"
            pages.unmap(where, size)
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        pages.map_shared(fd, 4 * LARGE, writable=False)


@pytest.mark.parametrize("num_blocks", [3, 64])
def test_the_memory_goes_with_the_last_view(num_blocks: int) -> None:
    region = Region(num_blocks, BLOCK)
    name, block = region.id, region.block(1)
    region.take([1])
    block[:5] = b"hello"
    region.close()
    del region
    gc.collect()
    assert bytes(block[:5]) == b"hello" and mapped(name) == 1
    block.release()
    gc.collect()
    assert mapped(name) == 0


def test_blocks_that_are_taken_lie_in_large_pages_and_the_others_nowhere() -> None:
    region = Region(1024, BLOCK)
    region.block(900)[:3] = b"old"
    before = large_bytes()
    region.take([0, 1])
    if large_bytes() == before:
        pytest.skip("this kernel gives no large pages")
    run = pages._AT_ONCE * LARGE
    assert large_bytes() - before == run, "those around block 0, and no more"
    assert os.fstat(region.fd).st_blocks * 512 < run + (1 << 20)
    region.take(range(1024))
    assert large_bytes() - before == 1024 * BLOCK // LARGE * LARGE
    assert bytes(region.block(900)[:3]) == b"old" and not any(region.block(5))
    assert region.generations[0] == 2 and region.generations[900] == 1


@pytest.mark.parametrize(("number", "calls"), [(errno.EINVAL, 1), (errno.ENOMEM, 8)])
def test_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch, number: int, calls: int) -> None:
    asked: list[tuple[int, int]] = []
    real = pages.libc()

    class Refusing:
        munmap = real.munmap

        def madvise(self, where: int, size: int, _advice: int) -> int:
            asked.append((where, size))
            ctypes.set_errno(number)
            return -1

    region = Region(1024, BLOCK)
    monkeypatch.setattr(pages, "libc", Refusing)
    region.take(range(1024))
    region.take(range(1024))
    assert len(asked) == calls, "what the kernel does not know is asked once, each run else"
    region.block(7)[:2] = b"ok"
