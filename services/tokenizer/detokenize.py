"""Incremental detokenization: ids in, text out as soon as no later id can change it.

Fed in any portions, the concatenated output equals the one-shot decode of all ids.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from services.tokenizer.pieces import PieceTable


class Detokenizer(Protocol):
    """The text of one growing id sequence. Never emits half a character."""

    @property
    def is_idle(self) -> bool:
        """Nothing held, and past the start: the next id's text is its table entry, if any."""

    def prime(self, context_ids: Sequence[int]) -> None:
        """Take the ids before the first one; their text is not emitted.

        A character that they leave incomplete is: it comes out with the ids that complete it.
        """

    def push(self, token_ids: Sequence[int]) -> str:
        """Consume ids; the text that is now certain."""

    def peek(self) -> str:
        """Held text that is whole characters now, but that a later id could still change."""

    def flush(self) -> str:
        """What is held, as the one-shot decode shows it at the end of a sequence."""


def open_detokenizer(table: PieceTable) -> Detokenizer:
    return ByteLevelDetokenizer(table) if table.is_byte_level else ByteRunDetokenizer(table)


class ByteLevelDetokenizer:
    """Text of byte-level BPE: one UTF-8 stream. Holds at most an incomplete character's bytes."""

    __slots__ = ("_from_context", "_held", "_raws")

    def __init__(self, table: PieceTable) -> None:
        self._raws = table.raws
        self._held = b""
        # The held bytes are all of the context's: nobody is to see them alone.
        self._from_context = False

    @property
    def is_idle(self) -> bool:
        return not self._held

    def prime(self, context_ids: Sequence[int]) -> None:
        self.push(context_ids)
        self._from_context = bool(self._held)

    def push(self, token_ids: Sequence[int]) -> str:
        raws = self._raws
        new = b"".join([raws[token_id] for token_id in token_ids])
        if not new:
            return ""
        self._from_context = False
        held = self._held + new
        # Not final: the codec leaves alone what could still become a character.
        text, used = utf_8_decode(held, "replace", False)
        self._held = held[used:]
        return text

    def peek(self) -> str:
        return ""

    def flush(self) -> str:
        held = b"" if self._from_context else self._held
        self._held = b""
        return held.decode("utf-8", "replace")


class ByteRunDetokenizer:
    """Text of tokenizers whose pieces are text, some with single bytes as a fallback.

    An unbroken run of byte tokens is text if all of it is valid UTF-8 and replacement characters
    otherwise, so the whole run is held until another token ends it.
    """

    __slots__ = ("_run", "_run_from_context", "_started", "_strip_left", "_table")

    def __init__(self, table: PieceTable) -> None:
        self._table = table
        self._run = bytearray()
        # How many of the run's first bytes the context left there.
        self._run_from_context = 0
        self._started = False
        self._strip_left = table.strip_count

    @property
    def is_idle(self) -> bool:
        return self._started and not self._run and not self._strip_left

    def prime(self, context_ids: Sequence[int]) -> None:
        self.push(context_ids)
        # NOTE: context that ends in whole characters ends its run. The prompt's text is what it is
        # whatever the output does.
        _, used = utf_8_decode(bytes(self._run), "replace", False)
        if used:
            self._strip(self._run[:used].decode("utf-8", "replace"))
        del self._run[:used]
        self._run_from_context = len(self._run)

    def push(self, token_ids: Sequence[int]) -> str:
        table, run = self._table, self._run
        texts, skipped = table.texts, table.skipped
        parts: list[str] = []
        for token_id in token_ids:
            if token_id in skipped:
                continue
            text = texts[token_id]
            if not self._started:
                self._started = True
                text = table.first_texts.get(token_id, text)
            if text is None:
                run += table.raws[token_id]
                continue
            if run:
                parts.append(self._take_run())
            parts.append(text)
        return self._strip("".join(parts))

    def peek(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            return ""
        return _without_leading(text, self._table.strip_char, self._strip_left)

    def flush(self) -> str:
        if len(self._run) == self._run_from_context:
            self._run.clear()
            return ""
        return self._strip(self._take_run())

    def _take_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\N{REPLACEMENT CHARACTER}" * len(self._run)
        self._run.clear()
        self._run_from_context = 0
        return text

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        rest = _without_leading(text, self._table.strip_char, self._strip_left)
        self._strip_left = 0 if rest else self._strip_left - len(text)
        return rest


def _without_leading(text: str, char: str, at_most: int) -> str:
    cut = 0
    while cut < at_most and text.startswith(char, cut) and cut < len(text):
        cut += 1
    return text[cut:]
