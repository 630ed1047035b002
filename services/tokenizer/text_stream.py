"""One handle of a text session: a growing id sequence with its text options."""

from __future__ import annotations

from collections.abc import Sequence

from services.tokenizer.detokenize import open_detokenizer
from services.tokenizer.pieces import PieceTable
from services.tokenizer.stops import StopAutomaton, StopScanner


class TextStream:
    """Text of one growing id sequence, up to a stop string.

    `consumed` is the number of ids taken, `matched_stop` the stop string that ended it.
    `is_plain` says that nothing is held, so that the next id's text is its entry in `texts`, if it
    has one and no character of it is in `stop_starts`. A caller may take it from there, and then
    counts it in `consumed`.
    """

    __slots__ = (
        "_detokenizer",
        "_keep_stop",
        "_scanner",
        "_skip_bytes",
        "consumed",
        "is_plain",
        "matched_stop",
        "stop_starts",
        "texts",
    )

    def __init__(
        self,
        table: PieceTable,
        stops: StopAutomaton | None,
        *,
        keep_stop: bool = False,
        context_ids: Sequence[int] = (),
        skip_bytes: int = 0,
    ) -> None:
        """`skip_bytes` of text are not emitted: the caller has them from before."""
        self._detokenizer = open_detokenizer(table)
        self._scanner = None if stops is None else StopScanner(stops)
        self._keep_stop = keep_stop
        self._skip_bytes = skip_bytes
        self.texts = table.texts
        self.stop_starts: frozenset[str] = frozenset() if stops is None else stops.first_chars
        self.consumed = 0
        self.matched_stop: str | None = None
        self._detokenizer.prime(context_ids)
        self.is_plain = self._can_look_up()

    def push(self, token_ids: Sequence[int]) -> str:
        """Consume ids, up to the one in which a stop string ends; the text now certain."""
        if self._scanner is None:
            self.consumed += len(token_ids)
            text = self._detokenizer.push(token_ids)
        else:
            text = self._push_scanning(token_ids, self._scanner)
        self.is_plain = self._can_look_up()
        return self._skip(text) if self._skip_bytes else text

    def flush(self) -> str:
        """What is held, at the end of the ids. It may complete a stop string."""
        text = self._detokenizer.flush()
        if self._scanner is not None:
            text = self._emit(text, self._scanner) + self._scanner.held
        return self._skip(text) if self._skip_bytes else text

    def _push_scanning(self, token_ids: Sequence[int], scanner: StopScanner) -> str:
        detokenizer = self._detokenizer
        parts = []
        # One by one: a stop string has to name the id in which it ended.
        for token_id in token_ids:
            self.consumed += 1
            text = detokenizer.push((token_id,))
            if text:
                parts.append(self._emit(text, scanner))
            if self.matched_stop is None:
                # Held bytes can be a stop string already ("\n" often is a byte token): waiting for
                # them to become certain would cost a step.
                held = detokenizer.peek()
                if held and scanner.probe(held):
                    parts.append(self._emit(held, scanner))
            if self.matched_stop is not None:
                break
        return "".join(parts)

    def _emit(self, text: str, scanner: StopScanner) -> str:
        certain = scanner.scan(text)
        match = scanner.match
        if match is None:
            return certain
        self.matched_stop = match.stop
        return certain if self._keep_stop else certain[: match.start]

    def _skip(self, text: str) -> str:
        """Leave out what the caller has; cut inside a character, that character is left out."""
        raw = text.encode()
        skipped = min(self._skip_bytes, len(raw))
        self._skip_bytes -= skipped
        if not self._skip_bytes:
            self.is_plain = self._can_look_up()
        return raw[skipped:].decode("utf-8", "ignore")

    def _can_look_up(self) -> bool:
        if self._skip_bytes or not self._detokenizer.is_idle:
            return False
        return self._scanner is None or not self._scanner.held
