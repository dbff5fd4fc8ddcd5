"""Stop strings: where a whole text would stop, pieces of it stop too."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pdbatch.engine.stop import StopChecker

_TEXT = st.text(alphabet="ab é", max_size=30)
_STOPS = st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3)


def test_a_stop_string_across_pieces_is_cut_off() -> None:
    checker = StopChecker(["END"])
    assert [checker.push(piece) for piece in ("one E", "N", "Dless")] == [None, None, "END"]
    assert checker.text == "one "


def test_the_first_stop_wins_and_of_equals_the_longest() -> None:
    checker = StopChecker(["b", "ab", "abc"])
    assert checker.push("xabc") == "abc"
    assert checker.text == "x"


def test_text_before_min_tokens_never_stops_later() -> None:
    checker = StopChecker(["stop"])
    assert checker.push("stop and st", armed=False) is None
    assert checker.push("op.") == "stop"
    assert checker.text == "stop and "


def test_settled_holds_back_what_may_become_a_stop() -> None:
    checker = StopChecker(["\n\nUser:", "###"])
    checker.push("hello #")
    assert checker.settled == len("hello ")
    checker.push("x\n")
    assert checker.settled == len("hello #x")
    assert StopChecker([], "abc").settled == 3


@settings(max_examples=300, deadline=None)
@given(text=_TEXT, stops=_STOPS, cuts=st.lists(st.integers(0, 30), max_size=6))
def test_pieces_stop_where_a_reader_of_single_letters_would(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """Letter by letter the earliest end decides; pieces may show more, never stop later."""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    checker, stopped = StopChecker(stops), None
    for begin, end in pairwise(edges):
        stopped = checker.push(text[begin:end])
        if stopped is not None:
            break
        assert not any(stop in checker.text for stop in stops)
        assert 0 <= checker.settled <= len(checker.text)
    if stopped is None:
        assert checker.text == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(checker.text + stopped)
        assert not any(stop in checker.text for stop in stops)
