"""rhizome.tokenizer.v1 over gRPC: requests in, the service's parts at work, responses out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from grpc import aio

from rhizome.tokenizer.v1 import (
    tokenizer_service_pb2 as pb,
    tokenizer_service_pb2_grpc as pb_grpc,
)
from services.common.errors import InvalidRequestError, OverloadedError
from services.common.rpc import MAX_MESSAGE_BYTES
from services.common.spans import NO_TRACER, Tracer
from services.tokenizer.chat import Chat, ChatTemplate
from services.tokenizer.detokenize import open_detokenizer
from services.tokenizer.encode import Encoder, Text, id_slices, sliced_prefix_hashes
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.pieces import PieceTables
from services.tokenizer.session import TextSession, skips_special_tokens

# A Tokenize of up to this size takes less time than its way to a thread and back, 0.1 ms.
_SHORT_BYTES = 512
# Unary calls waiting for a thread, beyond which new ones are shed.
_MAX_WAITING = 1024

# Of each result in a response, beside the result itself: its tag and length.
_RESULT_OVERHEAD = 8

_TOKENIZE = "rhizome.tokenizer.v1.TokenizerService/Tokenize"

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerParts:
    """What a loaded tokenizer consists of."""

    encoder: Encoder
    tables: PieceTables
    chat_template: ChatTemplate | None
    info: pb.GetTokenizerInfoResponse


class TokenizerServicer(pb_grpc.TokenizerServiceServicer):
    """Text streams run on the event loop; templates, encoding and whole texts in `pool`.

    All but short prompts, that is: text streams wait less for those than a thread would.
    """

    def __init__(
        self,
        parts: TokenizerParts,
        pool: ThreadPoolExecutor,
        metrics: TokenizerMetrics,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._parts = parts
        self._pool = pool
        self._metrics = metrics
        self._tracer = tracer
        self._num_waiting = 0

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        with (
            self._tracer.begin_call(_TOKENIZE, context, request.traceparent) as span,
            self._metrics.call("tokenize"),
        ):
            if request.ByteSize() <= _SHORT_BYTES:
                response = tokenize(self._parts, request)
            else:
                response = await self._in_pool(lambda: tokenize(self._parts, request))
            num_tokens = sum(len(result.token_ids) for result in response.results)
            span.set(num_prompts=len(request.inputs), num_prompt_tokens=num_tokens)
        self._metrics.prompt_tokens.inc(num_tokens)
        return response

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.DetokenizeResponse:
        with self._metrics.call("detokenize"):
            return await self._in_pool(lambda: detokenize(self._parts.tables, request))

    # The stubs know generators only; this one writes, which costs less a message.
    async def StreamText(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb.StreamTextRequest],
        context: aio.ServicerContext[Any, Any],
    ) -> None:
        session = TextSession(self._parts.tables)
        with self._metrics.text_streams.track_inprogress():
            async for request in request_iterator:
                for response in session.answer(request):
                    if response is None:
                        await asyncio.sleep(0)
                    else:
                        # Waits while the caller does not read: then nothing more is taken in.
                        await context.write(response)

    async def GetTokenizerInfo(
        self, request: pb.GetTokenizerInfoRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.GetTokenizerInfoResponse:
        return self._parts.info

    async def _in_pool(self, work: Callable[[], Result]) -> Result:
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError("too many texts are waiting to be tokenized")
        self._num_waiting += 1
        try:
            with self._metrics.waiting.track_inprogress():
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._num_waiting -= 1


def tokenize(
    parts: TokenizerParts, request: pb.TokenizeRequest, *, max_bytes: int = MAX_MESSAGE_BYTES
) -> pb.TokenizeResponse:
    """Render, encode and hash all inputs. Raises InvalidRequestError naming the input.

    Also where ids and hashes take more than `max_bytes`, which no message may: gRPC would call
    that RESOURCE_EXHAUSTED, as if trying again could help.
    """
    texts, stops = [], []
    for index, entry in enumerate(request.inputs):
        try:
            text, stop = _prompt(parts.chat_template, entry)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"input {index}: {error.message}", error.param) from error
        texts.append(text)
        stops.append(stop)
    response = pb.TokenizeResponse()
    num_bytes = num_tokens = 0
    for index, (token_ids, stop) in enumerate(zip(parts.encoder.encode(texts), stops, strict=True)):
        result = response.results.add(template_stop=stop)
        for ids in id_slices(token_ids):
            result.token_ids.extend(ids)
        if request.page_size:
            hashes = sliced_prefix_hashes(token_ids, request.page_size, request.namespace)
            result.prefix_hashes.extend(hashes)
        num_bytes += result.ByteSize() + _RESULT_OVERHEAD
        num_tokens += len(token_ids)
        if num_bytes > max_bytes:
            raise InvalidRequestError(
                f"input {index}: the prompt is too long: with it the request has {num_tokens} "
                f"tokens, which do not fit a message of {max_bytes} bytes"
            )
    return response


def detokenize(tables: PieceTables, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
    """Decode all sequences. Raises InvalidRequestError naming the sequence with a bad id."""
    table = tables.select(skips_special_tokens(request.options))
    response = pb.DetokenizeResponse()
    for index, sequence in enumerate(request.sequences):
        token_ids = list(sequence.token_ids)
        if token_ids and max(token_ids) >= table.vocab_size:
            raise InvalidRequestError(
                f"sequence {index}: id {max(token_ids)} is outside the vocabulary of "
                f"{table.vocab_size}",
                param="token_ids",
            )
        result = response.results.add()
        if request.as_pieces:
            result.pieces.extend([table.raws[token_id] for token_id in token_ids])
            continue
        detokenizer = open_detokenizer(table)
        texts = [detokenizer.push(ids) for ids in id_slices(token_ids)]
        result.text = "".join([*texts, detokenizer.flush()])
    return response


def _prompt(template: ChatTemplate | None, entry: pb.TokenizeInput) -> tuple[Text, list[str]]:
    """The text to encode, and the stop strings that its template brings."""
    kind = entry.WhichOneof("input")
    if kind == "text":
        special = not entry.HasField("add_special_tokens") or entry.add_special_tokens
        return Text(entry.text, special), []
    if kind is None:
        raise InvalidRequestError("neither text nor chat")
    if template is None:
        raise InvalidRequestError(
            "the model has no chat template; start the tokenizer with --chat-template or send text",
            param="messages",
        )
    special = not template.writes_special_tokens
    if entry.HasField("add_special_tokens"):
        special = entry.add_special_tokens
    return Text(template.render(_chat(entry.chat)), special), list(template.stop)


def _chat(chat: pb.ChatInput) -> Chat:
    messages = []
    for index, message in enumerate(chat.messages):
        extra = _json(message.extra_json, dict, f"messages[{index}].extra_json", "messages")
        messages.append({"content": message.content, **(extra or {}), "role": message.role})
    if chat.continue_final_message and chat.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    asks_prompt = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
    return Chat(
        messages=messages,
        tools=_json(chat.tools_json, list, "tools_json", "tools") or None,
        variables=_json(
            chat.template_kwargs_json, dict, "template_kwargs_json", "chat_template_kwargs"
        )
        or {},
        add_generation_prompt=asks_prompt and not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
    )


def _json(text: str, expected: type[Any], name: str, param: str) -> Any:
    """The JSON value of a field; None if the field is empty."""
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}", param) from error
    if not isinstance(value, expected):
        kind = "object" if expected is dict else "array"
        raise InvalidRequestError(f"{name} is not a JSON {kind}", param)
    return value
