"""Paged attention inside transformers' models.

    model layer ──q, k, v──► hook (what transformers calls) ──► the step's `StepAttention`

The runner passes one keyword (`hook.KEYWORD`) through the model's forward; it holds the
step's attention, which writes K and V into the cache and then attends over the block tables.
`paged` serves every device with plain torch operations; `probe` only looks at shapes.
"""

from __future__ import annotations
