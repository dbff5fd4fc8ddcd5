"""Celery's side of pdbatch: workers, the feeder and reconciler, `generate`, Flower's page.

    from tasks import generate
    generate.delay("The capital of France is", max_tokens=8).get(timeout=60)

`celery -A tasks …` finds the application here. Importing it contacts nobody.
"""

from __future__ import annotations

from tasks.app import app as celery
from tasks.generate import GenerateFailed, GenerateRejected, generate
from tasks.shards import prefill

__all__ = ["GenerateFailed", "GenerateRejected", "celery", "generate", "prefill"]
