"""POST /generate, SGLang's native API."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from services.gateway.exchange import EventStream, Exchange
from services.gateway.generation import ChoiceListener
from services.gateway.json_body import decode_body
from services.gateway.listeners import WholeText
from services.gateway.native.replies import (
    LogprobReplies,
    PlainReplies,
    ReplyForm,
)
from services.gateway.native.requests import GenerateRequest, NativeBatch, native_batch
from services.gateway.pipeline import Generation
from services.gateway.serving import Serving, trace

_decoder = msgspec.json.Decoder(GenerateRequest)
_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


async def generate(serving: Serving, exchange: Exchange) -> None:
    """Answer one prompt, or a batch with a list."""
    request = decode_body(_decoder, await exchange.body())
    if isinstance(request.rid, str):
        exchange.use_request_id(request.rid)
    batch = native_batch(
        request,
        exchange.request_id,
        serving.deadline(exchange.arrival_s),
        exchange.span,
        exchange.tenant,
    )
    if request.stream:
        await _stream(serving, exchange, request, batch)
    else:
        await _whole(serving, exchange, request, batch)


async def _whole(
    serving: Serving, exchange: Exchange, request: GenerateRequest, batch: NativeBatch
) -> None:
    texts = WholeText()
    generations = await serving.generations(
        exchange, request.model or "", batch.specs, lambda _: texts
    )
    await serving.run(exchange, generations)
    with_text = bool(request.return_text_in_logprobs)
    replies: list[dict[str, Any]] = []
    for generation, rid in zip(generations, batch.rids, strict=True):
        form = ReplyForm(rid, with_text=with_text)
        form.prompt_rows = generation.choices[0].prompt_logprobs
        for choice in generation.choices:
            pieces = None
            if with_text and choice.output_logprobs is not None:
                pieces = await serving.pipeline.tokenizers.pieces(form.mentioned_ids(choice))
            reply = form.reply(
                choice,
                texts.text(choice),
                len(choice.output_ids),
                pieces=pieces,
                e2e_latency=generation.elapsed_s,
            )
            if exchange.traced:
                reply["meta_info"]["rhizome"] = trace(exchange, generation)
            replies.append(reply)
    await exchange.reply_json(replies[0] if batch.single else replies)


async def _stream(
    serving: Serving, exchange: Exchange, request: GenerateRequest, batch: NativeBatch
) -> None:
    events = EventStream(exchange, serving.limits.max_client_buffer_bytes, serving.pipeline.metrics)
    n = batch.specs[0].num_choices
    plain: dict[int, PlainReplies] = {}
    queued: dict[int, LogprobReplies] = {}

    def listener(index: int) -> ChoiceListener:
        form = ReplyForm(batch.rids[index], with_text=bool(request.return_text_in_logprobs))
        first_index = None if batch.single else index * n
        if batch.specs[index].logprobs is None:
            plain[index] = PlainReplies(events, form, first_index)
            return plain[index]
        queued[index] = LogprobReplies(events, form, first_index, serving.pipeline.tokenizers)
        return queued[index].queue

    generations = await serving.generations(exchange, request.model or "", batch.specs, listener)
    for index, replies in plain.items():
        replies.generation = generations[index]

    def closing() -> list[bytes]:
        if not exchange.traced:
            return [_DONE]
        traces = [trace(exchange, generation) for generation in generations]
        return [b": rhizome-trace %b\n\n" % _encode(traces), _DONE]

    writer: Coroutine[Any, Any, None] | None = None
    if queued:
        writer = _write_all([(queued[i], generations[i]) for i in sorted(queued)])
    await serving.stream(exchange, events, generations, closing, writer)


async def _write_all(pairs: Sequence[tuple[LogprobReplies, Generation]]) -> None:
    """Prompts are written one after the other; each one's pieces wait in its queue."""
    for replies, generation in pairs:
        await replies.run(generation)
