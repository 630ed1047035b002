"""A text session: the handles of one StreamText call, columns of ids in, columns of text out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache

from rhizome.common.v1 import text_options_pb2
from rhizome.tokenizer.v1 import tokenizer_service_pb2 as pb
from services.common.errors import (
    InternalError,
    InvalidRequestError,
    PreconditionError,
    RhizomeError,
)
from services.tokenizer.pieces import PieceTables
from services.tokenizer.stops import StopAutomaton
from services.tokenizer.text_stream import TextStream

logger = logging.getLogger(__name__)

# Ids handled before the event loop gets a turn: well under a millisecond of work.
_IDS_A_SLICE = 1024
# Text of one response; in UTF-8 with its columns it stays below rpc.MAX_FRAME_BYTES.
_MAX_REPLY_CHARS = 32 * 1024


class TextSession:
    """The open handles of one StreamText call.

    Handles only increase, so one number tells ended handles, whose late ids are ignored, from
    those that were never opened: what is kept is bounded by the open handles.
    """

    def __init__(self, tables: PieceTables) -> None:
        self._tables = tables
        self._streams: dict[int, TextStream] = {}
        self._last_opened = -1
        self._reply = _Reply()

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def answer(self, request: pb.StreamTextRequest) -> Iterator[pb.StreamTextResponse | None]:
        """Yields the responses: at least one, the last when all of `request` is done.

        Yields None where the event loop is due a turn. Raises PreconditionError when the session
        has lost its place, InvalidRequestError when the columns do not fit together.
        """
        for opening in request.opens:
            yield from self._open(opening)
        yield from self._consume(request)
        for handle in request.finishes:
            self._finish(handle)
        for handle in request.closes:
            self._streams.pop(handle, None)
        yield from self._reply.take()

    def _open(self, opening: pb.OpenText) -> Iterator[pb.StreamTextResponse | None]:
        handle = opening.handle
        if handle <= self._last_opened:
            raise PreconditionError(f"handle {handle} is not above {self._last_opened}: reused")
        self._last_opened = handle
        try:
            self._streams[handle] = self._new_stream(opening)
        except RhizomeError as error:
            self._reply.fail(handle, error)
            return
        if opening.replay_ids:
            yield from self._feed(handle, list(opening.replay_ids))

    def _new_stream(self, opening: pb.OpenText) -> TextStream:
        options = opening.options
        context_ids = list(opening.context_ids)
        self._check_ids(context_ids)
        stops = tuple(options.stop)
        return TextStream(
            self._tables.select(skips_special_tokens(options)),
            _stop_automaton(stops) if stops else None,
            keep_stop=options.no_stop_trim,
            context_ids=context_ids,
            skip_bytes=opening.emitted_bytes,
        )

    def _consume(self, request: pb.StreamTextRequest) -> Iterator[pb.StreamTextResponse | None]:
        """Every handle's new ids. One id of a handle with nothing held is the case to be fast."""
        token_ids = list(request.token_ids)
        counts = list(request.num_ids)
        _check_columns(request, counts, len(token_ids))
        streams, reply = self._streams, self._reply
        end, slice_end = 0, _IDS_A_SLICE
        for handle, offset, count in zip(
            list(request.handles), list(request.id_offsets), counts, strict=True
        ):
            if end >= slice_end:
                slice_end = end + _IDS_A_SLICE
                yield from self._turn()
            start, end = end, end + count
            stream = streams.get(handle)
            if stream is not None and count == 1 and stream.is_plain and offset == stream.consumed:
                token_id = token_ids[start]
                text = stream.texts[token_id] if token_id < len(stream.texts) else None
                if text is not None and (
                    not stream.stop_starts or stream.stop_starts.isdisjoint(text)
                ):
                    stream.consumed = offset + 1
                    if text:
                        reply.handles.append(handle)
                        reply.ids_consumed.append(offset + 1)
                        reply.texts.append(text)
                    continue
            new_ids = self._new_ids(handle, offset, token_ids[start:end])
            if len(new_ids) > _IDS_A_SLICE:
                yield from self._feed(handle, new_ids)
            elif new_ids:
                self._push(handle, new_ids)

    def _new_ids(self, handle: int, offset: int, token_ids: list[int]) -> list[int]:
        """Those of `token_ids` that are new; none for a handle that has ended."""
        stream = self._streams.get(handle)
        if stream is None:
            self._refuse_unopened(handle)
            return []
        if offset > stream.consumed:
            raise PreconditionError(
                f"handle {handle}: ids {stream.consumed} to {offset - 1} are missing"
            )
        return token_ids[stream.consumed - offset :]

    def _feed(self, handle: int, token_ids: list[int]) -> Iterator[pb.StreamTextResponse | None]:
        """Push many ids in slices."""
        for start in range(0, len(token_ids), _IDS_A_SLICE):
            if start:
                yield from self._turn()
            self._push(handle, token_ids[start : start + _IDS_A_SLICE])

    def _push(self, handle: int, token_ids: list[int]) -> None:
        """Give an open handle its next ids. Its failure ends it and nothing else."""
        stream = self._streams.get(handle)
        if stream is None:
            return
        try:
            known = _known_prefix(token_ids, self._tables.vocab_size)
            self._reply.add(handle, stream.push(token_ids[:known]), stream)
            if stream.matched_stop is not None:
                del self._streams[handle]
            else:
                self._check_ids(token_ids[known:])
        except RhizomeError as error:
            self._fail(handle, error)
        except Exception:
            logger.exception("event=text_handle_failed handle=%d", handle)
            self._fail(handle, InternalError("internal error"))

    def _turn(self) -> Iterator[pb.StreamTextResponse | None]:
        """Lets the event loop work, and sends what has grown large."""
        if self._reply.num_chars > _MAX_REPLY_CHARS:
            yield from self._reply.take()
        else:
            yield None

    def _finish(self, handle: int) -> None:
        stream = self._streams.pop(handle, None)
        if stream is None:
            self._refuse_unopened(handle)
            return
        self._reply.add(handle, stream.flush(), stream)
        if stream.matched_stop is None:
            self._reply.ends.append(pb.TextEnd(handle=handle, finished=pb.TextEnd.Finished()))

    def _refuse_unopened(self, handle: int) -> None:
        """An error for a handle that this session does not know; none for one that has ended."""
        if handle > self._last_opened:
            self._reply.fail(handle, PreconditionError(f"handle {handle} was never opened"))

    def _fail(self, handle: int, error: RhizomeError) -> None:
        del self._streams[handle]
        self._reply.fail(handle, error)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        known = _known_prefix(token_ids, self._tables.vocab_size)
        if known < len(token_ids):
            raise InvalidRequestError(
                f"id {token_ids[known]} is outside the vocabulary of {self._tables.vocab_size}"
            )


class _Reply:
    """The columns of the response being filled."""

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.ids_consumed: list[int] = []
        self.texts: list[str] = []
        self.ends: list[pb.TextEnd] = []

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.texts))

    def add(self, handle: int, text: str, stream: TextStream) -> None:
        """A stream's new text, and its end if a stop string was found."""
        if text:
            self._append(handle, stream.consumed, text)
        if stream.matched_stop is not None:
            match = pb.StopMatch(id_index=stream.consumed - 1, stop=stream.matched_stop)
            self.ends.append(pb.TextEnd(handle=handle, stop=match))

    def fail(self, handle: int, error: RhizomeError) -> None:
        entry = pb.HandleError(code=error.code, message=error.message)
        self.ends.append(pb.TextEnd(handle=handle, error=entry))

    def _append(self, handle: int, ids_consumed: int, text: str) -> None:
        self.handles.append(handle)
        self.ids_consumed.append(ids_consumed)
        self.texts.append(text)

    def take(self) -> Iterator[pb.StreamTextResponse]:
        """What was filled in, as one response or, with much text, several; then starts anew."""
        if self.num_chars > _MAX_REPLY_CHARS:
            yield from self._take_fragments()
        yield pb.StreamTextResponse(
            handles=self.handles, ids_consumed=self.ids_consumed, texts=self.texts, ends=self.ends
        )
        for column in (self.handles, self.ids_consumed, self.texts, self.ends):
            column.clear()

    def _take_fragments(self) -> Iterator[pb.StreamTextResponse]:
        """Take out all entries of text but the last fragment's."""
        entries = list(zip(self.handles, self.ids_consumed, self.texts, strict=True))
        for column in (self.handles, self.ids_consumed, self.texts):
            column.clear()
        room = _MAX_REPLY_CHARS
        for handle, consumed, text in entries:
            for start in range(0, len(text), _MAX_REPLY_CHARS):
                piece = text[start : start + _MAX_REPLY_CHARS]
                if len(piece) > room:
                    yield pb.StreamTextResponse(
                        handles=self.handles, ids_consumed=self.ids_consumed, texts=self.texts
                    )
                    for column in (self.handles, self.ids_consumed, self.texts):
                        column.clear()
                    room = _MAX_REPLY_CHARS
                self._append(handle, consumed, piece)
                room -= len(piece)


def skips_special_tokens(options: text_options_pb2.TextOptions) -> bool:
    """Whether text leaves special tokens out; it does unless told otherwise.

    The options' spaces_between_special_tokens changes nothing: no tokenizer.json tokenizer puts
    spaces there.
    """
    return not options.HasField("skip_special_tokens") or options.skip_special_tokens


@lru_cache(maxsize=64)
def _stop_automaton(stops: tuple[str, ...]) -> StopAutomaton:
    return StopAutomaton(stops)


def _known_prefix(token_ids: Sequence[int], vocab_size: int) -> int:
    """How many ids come before the first one outside the vocabulary."""
    if not token_ids or max(token_ids) < vocab_size:
        return len(token_ids)
    return next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)


def _check_columns(request: pb.StreamTextRequest, counts: list[int], num_ids: int) -> None:
    if not len(request.handles) == len(request.id_offsets) == len(counts):
        raise InvalidRequestError("handles, id_offsets and num_ids differ in length")
    if sum(counts) != num_ids:
        raise InvalidRequestError(f"num_ids add up to {sum(counts)}, token_ids holds {num_ids}")
