"""In which order the sequences that decode stand in a step."""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt


class DecodeOrder:
    """Owns the order of decoding slots: by the pages of their prompts, lexicographically.

    Sequences with a common prefix are therefore neighbours, whatever its length, and attention
    finds the prefix's pages in the cache or reads them once for all. A slot's place changes only
    when it joins anew.
    """

    def __init__(self) -> None:
        # Page ids of the shared path as bytes, then the slot, ascending.
        self._places: list[tuple[bytes, int]] = []
        self._place_of: dict[int, tuple[bytes, int]] = {}
        self._slots: npt.NDArray[np.intp] | None = np.empty(0, np.intp)

    @property
    def slots(self) -> npt.NDArray[np.intp]:
        """All of them, in order."""
        if self._slots is None:
            self._slots = np.array([slot for _, slot in self._places], np.intp)
        return self._slots

    def join(self, slot: int, path: list[int]) -> None:
        """A slot decodes from here on; `path` is its pages in the prefix tree, root first."""
        # Any fixed byte order of the ids keeps equal prefixes together.
        place = self._place_of[slot] = (np.array(path, np.int32).tobytes(), slot)
        bisect.insort(self._places, place)
        self._slots = None

    def leave(self, slot: int) -> None:
        """A slot is free again; it may never have decoded."""
        place = self._place_of.pop(slot, None)
        if place is not None:
            del self._places[bisect.bisect_left(self._places, place)]
            self._slots = None
