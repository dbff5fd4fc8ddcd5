"""The engine: sequences, blocks, scheduler, runner. Knows no store, no Celery, no click."""
