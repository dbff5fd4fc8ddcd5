"""Outcomes between the pool and the bodies of tasks."""

from __future__ import annotations

import pytest

from tasks import handover


def test_each_place_of_a_message_that_came_twice_has_its_outcome() -> None:
    handover.leave("a", lambda: 1)
    handover.leave("a", lambda: 1)
    handover.leave("b", handover.raising(ValueError("broken")))
    assert [handover.fetch("a"), handover.fetch("a")] == [1, 1]
    with pytest.raises(ValueError, match="broken"):
        handover.fetch("b")
    for task_id in ("a", "b", "c"):
        with pytest.raises(handover.WrongPool):
            handover.fetch(task_id)
