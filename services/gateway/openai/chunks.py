"""The chunks of streamed completions, chat and text, as preformatted bytes.

The common case, a piece of text without log-probabilities, costs one JSON string between two
prepared pieces of bytes and one write.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_STOP
from services.gateway.exchange import EventStream
from services.gateway.generation import Choice, ChoiceFinish
from services.gateway.listeners import PieceQueue
from services.gateway.openai.logprobs import CompletionLogprobs, chat_entries, ids_of
from services.gateway.tokenizers import TokenizerPool

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def finish_reason(finish: ChoiceFinish | None) -> str:
    """OpenAI's word for why a choice ended."""
    return "stop" if finish is not None and finish.reason == FINISH_REASON_STOP else "length"


def matched_stop(finish: ChoiceFinish | None) -> int | str | None:
    """SGLang's extension: the stop string or token id that ended the choice."""
    if finish is None:
        return None
    return finish.matched_stop if finish.matched_stop is not None else finish.matched_token_id


class ChunkFormat:
    """Chunks of one response. `head` holds id, object, created and model.

    `include_usage` puts the `usage: null` into every chunk that OpenAI puts there.
    """

    def __init__(self, head: dict[str, Any], *, chat: bool, include_usage: bool) -> None:
        self.chat = chat
        self._head = b"data: " + _encode(head)[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    def text_ends(self, index: int) -> tuple[bytes, bytes]:
        """What goes before and after a JSON string to make a chunk of choice `index`."""
        opening = b'"delta":{"content":' if self.chat else b'"text":'
        closing = b"}" if self.chat else b""
        return (
            b'%b,"choices":[{"index":%d,%b' % (self._head, index, opening),
            b'%b,"logprobs":null,"finish_reason":null}]%b' % (closing, self._tail),
        )

    def text(self, index: int, text: str, logprobs: object | None) -> bytes:
        body: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._choice({"index": index, **body, "logprobs": logprobs, "finish_reason": None})

    def role(self, index: int) -> bytes:
        """A chat choice's first chunk."""
        delta = {"role": "assistant", "content": ""}
        return self._choice(
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        )

    def end(self, index: int, finish: ChoiceFinish | None) -> bytes:
        body: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._choice(
            {
                "index": index,
                **body,
                "logprobs": None,
                "finish_reason": finish_reason(finish),
                "matched_stop": matched_stop(finish),
            }
        )

    def closing(self, members: dict[str, Any]) -> bytes:
        """The last chunk, without choices: usage and what else was asked for."""
        return b'%b,"choices":[],%b\n\n' % (self._head, _encode(members)[1:])

    def _choice(self, choice: dict[str, Any]) -> bytes:
        return b'%b,"choices":[%b]%b' % (self._head, _encode(choice), self._tail)


class PlainChunks:
    """Writes each piece of text as it comes, from within the call that brings it."""

    def __init__(self, events: EventStream, form: ChunkFormat, first_index: int, n: int) -> None:
        self._write = events.write
        self._form = form
        self._first_index = first_index
        self._ends = [form.text_ends(first_index + i) for i in range(n)]

    def on_text(self, choice: Choice, text: str) -> None:
        if text:
            prefix, suffix = self._ends[choice.index]
            self._write(prefix + _encode(text) + suffix)

    def on_end(self, choice: Choice) -> None:
        self._write(self._form.end(self._first_index + choice.index, choice.finish))


class LogprobChunks:
    """Writes chunks with log-probabilities; token texts may have to be fetched in between."""

    def __init__(
        self,
        events: EventStream,
        form: ChunkFormat,
        first_index: int,
        tokenizers: TokenizerPool,
        num_top: int,
    ) -> None:
        self.queue = PieceQueue()
        self._events = events
        self._form = form
        self._first_index = first_index
        self._tokenizers = tokenizers
        self._num_top = num_top
        self._num_reported: dict[Choice, int] = {}
        self._offsets: dict[Choice, CompletionLogprobs] = {}

    async def run(self, choices: list[Choice], echo: str | None) -> None:
        """Write until all choices have ended."""
        if echo is not None:
            await self._write_echo(choices, echo)
        async for piece in self.queue.pieces(len(choices)):
            await self._write_piece(piece.choice, piece.text, piece.ids_consumed)
            if piece.ended:
                choice = piece.choice
                self._events.write(self._form.end(self._first_index + choice.index, choice.finish))

    async def _write_piece(self, choice: Choice, text: str, stop: int) -> None:
        rows = choice.output_logprobs
        assert rows is not None, "log-probabilities were asked for"
        start = self._num_reported.get(choice, 0)
        stop = min(stop, len(rows), len(choice.output_ids))
        if stop <= start and not text:
            return
        self._num_reported[choice] = max(start, stop)
        pieces = await self._tokenizers.pieces(ids_of(rows, start, stop))
        logprobs: object
        if self._form.chat:
            logprobs = {"content": chat_entries(rows, start, stop, pieces), "refusal": None}
        else:
            logprobs = self._offset(choice).block(rows, start, stop, pieces)
        self._events.write(self._form.text(self._first_index + choice.index, text, logprobs))

    async def _write_echo(self, choices: list[Choice], echo: str) -> None:
        """The prompt's text and log-probabilities, once they are complete."""
        first = choices[0]
        rows = first.prompt_logprobs
        assert rows is not None, "an echo with log-probabilities asks for the prompt's"
        # Prompt positions come before the first output of their choice.
        await self.queue.wait_for(first)
        pieces = await self._tokenizers.pieces(ids_of(rows, 0, len(rows)))
        for choice in choices:
            block = self._offset(choice).block(rows, 0, len(rows), pieces, echo)
            self._events.write(self._form.text(self._first_index + choice.index, echo, block))

    def _offset(self, choice: Choice) -> CompletionLogprobs:
        return self._offsets.setdefault(choice, CompletionLogprobs(self._num_top))
