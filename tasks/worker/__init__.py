"""The main process of a worker, without Celery: claims, hand-offs, rows, signs of life.

It never touches the device; the engine, its child, does. See `tasks.worker.core` for the life.
"""
