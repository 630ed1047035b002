"""Replies of POST /generate: `{text, output_ids, meta_info}` as SGLang shapes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_STOP
from services.gateway.exchange import EventStream
from services.gateway.generation import MIN_LOGPROB, Choice, LogprobRows
from services.gateway.listeners import PieceQueue
from services.gateway.pipeline import Generation
from services.gateway.tokenizers import TokenizerPool

_encode = msgspec.json.Encoder().encode


class ReplyForm:
    """How one prompt's replies look. `rid` names it.

    `prompt_rows` are the first choice's; they serve its siblings too.
    """

    def __init__(self, rid: str, *, with_text: bool) -> None:
        self.rid = rid
        self.with_text = with_text
        self.prompt_rows: LogprobRows | None = None

    def reply(
        self,
        choice: Choice,
        text: str,
        num_ids: int,
        index: int | None = None,
        pieces: Mapping[int, bytes] | None = None,
        e2e_latency: float | None = None,
    ) -> dict[str, Any]:
        """The state after `num_ids` output ids."""
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": _finish(choice) if choice.ended else None,
            "prompt_tokens": len(choice.prompt.token_ids),
            "weight_version": "default",
            "completion_tokens": num_ids,
            "cached_tokens": choice.cached_tokens,
        }
        if choice.output_logprobs is not None:
            meta.update(self._logprobs(choice, num_ids, pieces if self.with_text else None))
        if e2e_latency is not None:
            meta["e2e_latency"] = e2e_latency
        reply: dict[str, Any] = {
            "text": text,
            "output_ids": choice.output_ids[:num_ids],
            "meta_info": meta,
        }
        if index is not None:
            reply["index"] = index
        return reply

    def mentioned_ids(self, choice: Choice) -> set[int]:
        """Every id that the choice's log-probabilities mention."""
        ids: set[int] = set()
        for rows in (self.prompt_rows, choice.output_logprobs):
            if rows is not None:
                ids.update(rows.token_ids, rows.top_token_ids)
        if choice.prompt.spec.logprobs is not None:
            ids.update(choice.prompt.spec.logprobs.token_ids)
        return ids

    def _logprobs(
        self, choice: Choice, num_ids: int, pieces: Mapping[int, bytes] | None
    ) -> dict[str, Any]:
        options = choice.prompt.spec.logprobs
        outputs, prompt = choice.output_logprobs, self.prompt_rows
        assert options is not None, "a choice has rows only where they were asked for"
        assert outputs is not None, "the caller has looked"
        members: dict[str, Any] = {}
        for side, rows, count in (
            ("input", prompt, len(prompt) if prompt is not None else 0),
            ("output", outputs, min(num_ids, len(outputs))),
        ):
            chosen: list[Any] = []
            tops: list[Any] = []
            requested: list[Any] = []
            if rows is not None:
                for row in range(count):
                    chosen.append(_entry(rows.logprobs[row], rows.token_ids[row], pieces))
                    known = not math.isnan(rows.logprobs[row])
                    tops.append(_tops(rows, row, pieces) if known else None)
                    values = zip(rows.requested(row), options.token_ids, strict=False)
                    requested.append([_entry(lp, i, pieces) for lp, i in values] if known else None)
            members[f"{side}_token_logprobs"] = chosen
            if options.num_top:
                members[f"{side}_top_logprobs"] = tops
            if options.token_ids:
                members[f"{side}_token_ids_logprobs"] = requested
        members["output_token_logprobs_length"] = len(members["output_token_logprobs"])
        return members


class PlainReplies:
    """Streams each choice's growing reply from within the call that brings new text."""

    def __init__(self, events: EventStream, form: ReplyForm, first_index: int | None) -> None:
        self.generation: Generation | None = None
        self._events = events
        self._form = form
        self._first_index = first_index
        self._texts: dict[Choice, str] = {}

    def on_text(self, choice: Choice, text: str) -> None:
        if text:
            whole = self._texts.get(choice, "") + text
            self._texts[choice] = whole
            self._write(choice, whole, choice.ids_consumed)

    def on_end(self, choice: Choice) -> None:
        self._write(choice, self._texts.get(choice, ""), len(choice.output_ids))

    def _write(self, choice: Choice, text: str, num_ids: int) -> None:
        reply = self._form.reply(
            choice,
            text,
            num_ids,
            _index(self._first_index, choice),
            e2e_latency=_latency(self.generation) if choice.ended else None,
        )
        self._events.write(b"data: %b\n\n" % _encode(reply))


class LogprobReplies:
    """As `PlainReplies`, with log-probabilities, whose token texts may have to be fetched."""

    def __init__(
        self,
        events: EventStream,
        form: ReplyForm,
        first_index: int | None,
        tokenizers: TokenizerPool,
    ) -> None:
        self.queue = PieceQueue()
        self._events = events
        self._form = form
        self._first_index = first_index
        self._tokenizers = tokenizers

    async def run(self, generation: Generation) -> None:
        """Write until all choices have ended."""
        texts: dict[Choice, str] = {}
        self._form.prompt_rows = generation.choices[0].prompt_logprobs
        async for piece in self.queue.pieces(len(generation.choices)):
            choice = piece.choice
            texts[choice] = texts.get(choice, "") + piece.text
            pieces: Mapping[int, bytes] | None = None
            if self._form.with_text:
                pieces = await self._tokenizers.pieces(self._form.mentioned_ids(choice))
            reply = self._form.reply(
                choice,
                texts[choice],
                min(piece.ids_consumed, len(choice.output_ids)),
                _index(self._first_index, choice),
                pieces,
                _latency(generation) if piece.ended else None,
            )
            if not piece.ended:
                reply["meta_info"]["finish_reason"] = None
            self._events.write(b"data: %b\n\n" % _encode(reply))


def _index(first_index: int | None, choice: Choice) -> int | None:
    return None if first_index is None else first_index + choice.index


def _latency(generation: Generation | None) -> float | None:
    return None if generation is None else generation.elapsed_s


def _finish(choice: Choice) -> dict[str, Any]:
    finish = choice.finish
    if finish is not None and finish.reason == FINISH_REASON_STOP:
        matched = finish.matched_stop
        return {
            "type": "stop",
            "matched": matched if matched is not None else finish.matched_token_id,
        }
    return {"type": "length", "length": len(choice.output_ids)}


def _entry(logprob: float, token_id: int, pieces: Mapping[int, bytes] | None) -> list[Any]:
    return [
        None if math.isnan(logprob) else max(logprob, MIN_LOGPROB),
        token_id,
        None if pieces is None else pieces[token_id].decode("utf-8", "replace"),
    ]


def _tops(rows: LogprobRows, row: int, pieces: Mapping[int, bytes] | None) -> list[Any]:
    return [_entry(logprob, token_id, pieces) for token_id, logprob in rows.top(row)]
