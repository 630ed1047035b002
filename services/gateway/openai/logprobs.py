"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from services.gateway.generation import MIN_LOGPROB, LogprobRows


def ids_of(rows: LogprobRows, start: int, stop: int) -> list[int]:
    """Every token id that rows `start` to `stop` - 1 mention."""
    top = rows.top_token_ids[start * rows.num_top : stop * rows.num_top]
    return rows.token_ids[start:stop] + top


def chat_entries(
    rows: LogprobRows, start: int, stop: int, pieces: Mapping[int, bytes]
) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` of chat completions."""
    return [
        {
            **_chat_token(rows.token_ids[row], rows.logprobs[row], pieces),
            "top_logprobs": [
                _chat_token(token_id, logprob, pieces) for token_id, logprob in rows.top(row)
            ],
        }
        for row in range(start, stop)
    ]


def _chat_token(token_id: int, logprob: float, pieces: Mapping[int, bytes]) -> dict[str, Any]:
    piece = pieces[token_id]
    return {
        "token": piece.decode("utf-8", "replace"),
        "logprob": _finite(logprob),
        "bytes": list(piece),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of text completions, piece by piece.

    `text_offset` counts characters of the choice's text, the echoed prompt included.
    """

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._offset = 0

    def block(
        self,
        rows: LogprobRows,
        start: int,
        stop: int,
        pieces: Mapping[int, bytes],
        echo: str | None = None,
    ) -> dict[str, Any]:
        """Rows `start` to `stop` - 1; `echo` is the text they stand for where that is a prompt.

        A prompt may hold special tokens that its text does not; they take no room in it.
        """
        rest = None if echo is None else echo.encode()
        tokens: list[str] = []
        offsets: list[int] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for row in range(start, stop):
            token_id, logprob = rows.token_ids[row], rows.logprobs[row]
            token = _completion_token(pieces[token_id])
            tokens.append(token)
            offsets.append(self._offset)
            piece = pieces[token_id]
            if rest is not None:
                piece = _leading(piece, rest)
                rest = rest[len(piece) :]
            self._offset += _num_characters(piece)
            if math.isnan(logprob):
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(_finite(logprob))
            top = {_completion_token(pieces[i]): _finite(value) for i, value in rows.top(row)}
            # The chosen token is always among them.
            top.setdefault(token, _finite(logprob))
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self._num_top else None,
            "text_offset": offsets,
        }


def join_blocks(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two consecutive blocks as one."""
    if first is None:
        return second
    return {name: None if first[name] is None else first[name] + second[name] for name in second}


def _completion_token(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _leading(piece: bytes, text: bytes) -> bytes:
    """What of `piece` `text` begins with: all of it, all but a leading space, or nothing."""
    if text.startswith(piece):
        return piece
    stripped = piece.lstrip(b" ")
    return stripped if text.startswith(stripped) else b""


def _num_characters(piece: bytes) -> int:
    """Characters that begin in `piece`."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
