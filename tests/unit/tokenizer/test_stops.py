"""Stop strings found in streamed text, against a plain search of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from services.common.errors import InvalidRequestError
from services.common.limits import MAX_STOP_CHARS, MAX_STOP_STRINGS
from services.tokenizer.stops import StopAutomaton, StopScanner

SMALL = st.text("ab\n", min_size=1, max_size=4)


def reference(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(end, start) of the match that ends first, the longest of those."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return min(found) if found else None


def scan(portions: list[str], stops: list[str]) -> tuple[list[str], StopScanner]:
    scanner = StopScanner(StopAutomaton(stops))
    emitted = []
    for portion in portions:
        emitted.append(scanner.scan(portion))
        if scanner.match is not None:
            break
    return emitted, scanner


@given(
    portions=st.lists(st.text("ab\nc", max_size=6), max_size=8),
    stops=st.lists(SMALL, min_size=1, max_size=4),
)
def test_the_match_that_ends_first_wins_however_text_is_portioned(
    portions: list[str], stops: list[str]
) -> None:
    text = "".join(portions)
    emitted, scanner = scan(portions, stops)
    expected = reference(text, stops)
    if expected is None:
        assert scanner.match is None
        assert "".join(emitted) + scanner.held == text
        return
    end, start = expected
    assert scanner.match is not None
    assert scanner.match.stop == text[start:end]
    before = "".join(emitted[:-1])
    assert before + emitted[-1] == text[:end]
    assert before + emitted[-1][: scanner.match.start] == text[:start]


@given(portions=st.lists(st.text("abc", max_size=5), max_size=6), stops=st.lists(SMALL, min_size=1))
def test_no_more_is_held_than_could_become_a_stop_string(
    portions: list[str], stops: list[str]
) -> None:
    emitted, scanner = scan(portions, stops)
    if scanner.match is not None:
        return
    text = "".join(portions)
    longest = max(
        len(stop[:size])
        for stop in stops
        for size in range(len(stop))
        if text.endswith(stop[:size])
    )
    assert len(scanner.held) == longest
    assert "".join(emitted) == text[: len(text) - longest]


@given(
    scanned=st.text("ab", max_size=5),
    growing=st.lists(st.text("ab", max_size=2), min_size=1, max_size=5),
    stops=st.lists(SMALL, min_size=1, max_size=3),
)
def test_probing_foresees_what_scanning_would_find(
    scanned: str, growing: list[str], stops: list[str]
) -> None:
    _, scanner = scan([scanned], stops)
    if scanner.match is not None:
        return
    held = ""
    for more in growing:
        held += more
        if scanner.probe(held):
            assert reference(scanned + held, stops) is not None
            break
        assert reference(scanned + held, stops) is None
    assert scanner.match is None
    scanner.scan("".join(growing))
    assert (scanner.match is None) == (reference(scanned + "".join(growing), stops) is None)


def test_a_new_scan_forgets_what_was_probed() -> None:
    scanner = StopScanner(StopAutomaton(["xy"]))
    assert not scanner.probe("x")
    scanner.scan("-")
    assert not scanner.probe("y")


@pytest.mark.parametrize(
    "stops",
    [[""], ["a", ""], ["a"] * (2 * MAX_STOP_STRINGS + 1), ["a" * (2 * MAX_STOP_CHARS + 1)]],
    ids=str,
)
def test_senseless_stop_strings_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StopAutomaton(stops)
    assert caught.value.param == "stop"
