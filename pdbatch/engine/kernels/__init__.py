"""Triton kernels over the paged pool, and those that stand between a layer's products.

Imported on a GPU only (and by tests, through Triton's interpreter): nothing here is reachable
where no Triton is. Each module holds one kernel and the function that launches it. Pointers to
the pool are to elements of `[N, L, 2, H, b, D]`, whole: a kernel is told the distance between two
blocks and where its layer begins, so the block-major pool is used as it lies.

Numbers of the step (lengths, tables, slots) are read from device memory, never passed as
arguments: a captured graph stays right when they change. What is masked is never read from
memory as a number, so old content of a block, even NaN, cannot be seen.
"""

from __future__ import annotations
