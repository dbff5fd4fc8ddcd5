"""pdbatch: large batches of prompts through language models, prefill and decode apart."""

from __future__ import annotations
