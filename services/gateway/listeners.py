"""Listeners that gather what choices produce, for answers that are made elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.gateway.generation import Choice


class WholeText:
    """Keeps each choice's text until the end."""

    def __init__(self) -> None:
        self._parts: dict[Choice, list[str]] = {}

    def on_text(self, choice: Choice, text: str) -> None:
        if text:
            self._parts.setdefault(choice, []).append(text)

    def on_end(self, choice: Choice) -> None:
        return

    def text(self, choice: Choice) -> str:
        return "".join(self._parts.get(choice, ()))


@dataclass(slots=True, frozen=True)
class Piece:
    """Something new of one choice: text and ids settled up to `ids_consumed`, or its end."""

    choice: Choice
    text: str
    ids_consumed: int
    ended: bool


class PieceQueue:
    """Hands pieces to a coroutine that may have to wait between them.

    Bounded by the output that the choices may still produce.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._arrived = asyncio.Event()

    def on_text(self, choice: Choice, text: str) -> None:
        self._pieces.append(Piece(choice, text, choice.ids_consumed, False))
        self._arrived.set()

    def on_end(self, choice: Choice) -> None:
        self._pieces.append(Piece(choice, "", choice.ids_consumed, True))
        self._arrived.set()

    async def wait_for(self, choice: Choice) -> None:
        """Until there is a piece of `choice`; nothing is handed out."""
        while not any(piece.choice is choice for piece in self._pieces):
            self._arrived.clear()
            await self._arrived.wait()

    async def pieces(self, num_choices: int) -> AsyncIterator[Piece]:
        """All pieces in order, until `num_choices` choices have ended."""
        while num_choices:
            await self._arrived.wait()
            self._arrived.clear()
            batch, self._pieces = self._pieces, []
            for piece in batch:
                num_choices -= piece.ended
                yield piece
