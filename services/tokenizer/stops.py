"""Stop strings in growing text: finds the first to end, and holds back what could become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from services.common.errors import InvalidRequestError
from services.common.limits import MAX_STOP_CHARS, MAX_STOP_STRINGS

# Bounds of the automaton: the request's own and the template's.
_MAX_STOPS = 2 * MAX_STOP_STRINGS
_MAX_CHARS = 2 * MAX_STOP_CHARS


class StopMatch(NamedTuple):
    """A stop string found, as its first index and the one after its last, in the scanned text."""

    stop: str
    start: int
    end: int


class StopAutomaton:
    """All stop strings of a request as one automaton over characters; immutable.

    Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975). A state
    is the longest end of the text that begins a stop string, so `depth` is the number of
    characters to hold back.
    """

    __slots__ = ("_children", "_fallback", "depth", "first_chars", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InvalidRequestError for an empty stop string or for too many or too long ones."""
        _check(stops)
        self.first_chars = frozenset(stop[0] for stop in stops)
        self.depth = [0]
        # The longest stop string that ends in each state.
        self.found: list[str | None] = [None]
        self._children: list[dict[str, int]] = [{}]
        self._fallback = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        children, fallback = self._children, self._fallback
        while (after := children[state].get(char)) is None:
            if state == 0:
                return 0
            state = fallback[state]
        return after

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            child = self._children[state].get(char)
            if child is None:
                child = len(self.depth)
                self._children[state][char] = child
                self._children.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
            state = child
        self.found[state] = stop

    def _link(self) -> None:
        """Fill the fallbacks, shallow states first."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._children[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                self.found[child] = self.found[child] or self.found[self._fallback[child]]
                queue.append(child)


class StopScanner:
    """Scans one growing text for stop strings.

    The match that ends first wins; of those that end together, the longest. `held` is always the
    longest end of the text that begins a stop string.
    """

    __slots__ = ("_automaton", "_probed", "_probed_state", "_state", "held", "match")

    def __init__(self, automaton: StopAutomaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._probed = 0
        self._probed_state = 0
        self.held = ""
        self.match: StopMatch | None = None

    def scan(self, text: str) -> str:
        """Consume text; what is certain to be output.

        On a match sets `match`, whose indices are of the text returned: all up to the stop
        string's end. The scanner has ended then.
        """
        automaton, state = self._automaton, self._state
        self._probed = 0
        if state == 0 and automaton.first_chars.isdisjoint(text):
            return text
        before = len(self.held)
        text = self.held + text
        for index in range(before, len(text)):
            state = automaton.step(state, text[index])
            stop = automaton.found[state]
            if stop is not None:
                end = index + 1
                self.match = StopMatch(stop, end - len(stop), end)
                self.held = ""
                return text[:end]
        cut = len(text) - automaton.depth[state]
        self.held = text[cut:]
        self._state = state
        return text[:cut]

    def probe(self, text: str) -> bool:
        """Whether scanning `text` would match.

        Between two scans `text` may only grow: what was looked at is not looked at again.
        """
        if self._probed == 0:
            self._probed_state = self._state
        for char in text[self._probed :]:
            self._probed_state = self._automaton.step(self._probed_state, char)
            if self._automaton.found[self._probed_state] is not None:
                return True
        self._probed = len(text)
        return False


def _check(stops: Sequence[str]) -> None:
    if not all(stops):
        raise InvalidRequestError("a stop string is empty", param="stop")
    if len(stops) > _MAX_STOPS or sum(map(len, stops)) > _MAX_CHARS:
        raise InvalidRequestError(
            f"at most {_MAX_STOPS} stop strings of {_MAX_CHARS} characters in all, got "
            f"{len(stops)} of {sum(map(len, stops))}",
            param="stop",
        )
