"""Flower with a first page of pdbatch's own: the jobs and how far they are.

Flower is not forked: our handlers are put into its list before it starts, ahead of its own
first page, which stays at `/workers`. Everything listens on the loopback unless told otherwise.
"""

from __future__ import annotations

from tasks.flower.serve import serve

__all__ = ["serve"]
