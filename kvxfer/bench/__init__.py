"""Latency and bandwidth of every transport of this machine, beside the machine's own limit.

The producer is another process (of `mem`: this one). Every transport, its limit and every rival
that was asked for take turns within one run, each round in another order, so that ratios hold on a
machine that others use too; a share is the median of the ratios within the rounds, every other
figure a median too.
All go through pools larger than the processor's caches, other blocks at each turn, as an engine
does; a transport's blocks are scattered at both ends, as a rival's are, a limit's bytes are
contiguous. A transport's time is that of the whole pull, with its proof.

| transport | limit |
| --- | --- |
| mem, shm | one memcpy of as many bytes, by one thread, between ordinary buffers of one process |
| tcp | as many bytes through a plain socket on the loopback, from another process |
| rdma | ib_read_bw (perftest) with requests of one block, measured once for each size |
| cuda_ipc | one contiguous peer copy of as many bytes |

    cli       what may be asked           source   the producer's process
    ways      transports and limits       race     turns and their times
    limits    the machine's own           report   rows, table, JSON;   plot: SVG
    rivals    others' libraries, in a Python of theirs
"""

from __future__ import annotations

from kvxfer.bench.cli import main

__all__ = ["main"]
