"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from rhizome.tokenizer.v1.tokenizer_service_pb2 import ChatInput, TokenizeInput
from services.common.errors import InvalidRequestError
from services.gateway.exchange import EventStream, Exchange, schedule_id
from services.gateway.generation import ChoiceListener, GenerationSpec
from services.gateway.json_body import decode_body
from services.gateway.listeners import WholeText
from services.gateway.openai.chunks import (
    DONE,
    ChunkFormat,
    LogprobChunks,
    PlainChunks,
    finish_reason,
    matched_stop,
)
from services.gateway.openai.logprobs import chat_entries, ids_of
from services.gateway.openai.messages import chat_messages
from services.gateway.openai.request_log import log_request
from services.gateway.openai.requests import ChatRequest
from services.gateway.pipeline import Generation
from services.gateway.sampling import check_choices
from services.gateway.serving import Serving, trace, usage

_decoder = msgspec.json.Decoder(ChatRequest)
_encode = msgspec.json.Encoder().encode


async def chat_completions(serving: Serving, exchange: Exchange) -> None:
    """Answer one chat, whole or streaming."""
    request = decode_body(_decoder, await exchange.body())
    if request.rid is not None:
        exchange.use_request_id(request.rid)
    spec = _spec(request, exchange, serving)
    if request.stream:
        await _stream(serving, exchange, request, spec)
    else:
        await _whole(serving, exchange, request, spec)


def _spec(request: ChatRequest, exchange: Exchange, serving: Serving) -> GenerationSpec:
    request.check()
    limit, limit_name = request.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, limit_name = request.max_tokens, "max_tokens"
    return GenerationSpec(
        request_id=exchange.request_id,
        schedule_id=schedule_id(exchange.request_id),
        input=TokenizeInput(chat=_chat_input(request)),
        sampling=request.sampling(limit, limit_name),
        text_options=request.text(),
        logprobs=request.logprob_options(),
        num_choices=check_choices("n", request.n),
        tenant=exchange.tenant,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        session_id=request.session_id or "",
        input_param="messages",
        deadline=serving.deadline(exchange.arrival_s),
        span=exchange.span,
    )


def _chat_input(request: ChatRequest) -> ChatInput:
    messages = chat_messages(request.messages)
    if request.continue_final_message and messages[-1].role != "assistant":
        raise InvalidRequestError(
            "continue_final_message needs the last message to be the assistant's",
            "continue_final_message",
        )
    tools, kwargs = request.rendered_tools, request.chat_template_kwargs
    return ChatInput(
        messages=messages,
        tools_json=_encode(tools).decode() if tools else "",
        template_kwargs_json=_encode(kwargs).decode() if kwargs else "",
        add_generation_prompt=(
            not request.continue_final_message
            if request.add_generation_prompt is None
            else request.add_generation_prompt
        ),
        continue_final_message=bool(request.continue_final_message),
    )


def _head(serving: Serving, exchange: Exchange, request: ChatRequest, kind: str) -> dict[str, Any]:
    model = serving.pipeline.control.table.model(request.model or "")
    return {
        "id": f"chatcmpl-{exchange.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": f"fp_{model.identity.model_revision[:12]}",
    }


async def _whole(
    serving: Serving, exchange: Exchange, request: ChatRequest, spec: GenerationSpec
) -> None:
    texts = WholeText()
    (generation,) = await serving.generations(
        exchange, request.model or "", [spec], lambda _: texts
    )
    head = _head(serving, exchange, request, "chat.completion")
    await serving.run(exchange, [generation])
    choices = []
    for choice in generation.choices:
        logprobs = None
        if (rows := choice.output_logprobs) is not None:
            count = min(len(rows), len(choice.output_ids))
            pieces = await serving.pipeline.tokenizers.pieces(ids_of(rows, 0, count))
            logprobs = {"content": chat_entries(rows, 0, count, pieces), "refusal": None}
        choices.append(
            {
                "index": choice.index,
                "message": {
                    "role": "assistant",
                    "content": texts.text(choice),
                    "refusal": None,
                },
                "logprobs": logprobs,
                "finish_reason": finish_reason(choice.finish),
                "matched_stop": matched_stop(choice.finish),
            }
        )
    reply = {**head, "choices": choices, "usage": usage([generation])}
    if exchange.traced:
        reply["rhizome"] = trace(exchange, generation)
    log_request(exchange, request, [generation])
    await exchange.reply_json(reply)


async def _stream(
    serving: Serving, exchange: Exchange, request: ChatRequest, spec: GenerationSpec
) -> None:
    events = EventStream(exchange, serving.limits.max_client_buffer_bytes, serving.pipeline.metrics)
    head = _head(serving, exchange, request, "chat.completion.chunk")
    form = ChunkFormat(head, chat=True, include_usage=request.include_usage)
    listener: ChoiceListener
    chunks: LogprobChunks | None = None
    if spec.logprobs is None:
        listener = PlainChunks(events, form, 0, spec.num_choices)
    else:
        chunks = LogprobChunks(events, form, 0, serving.pipeline.tokenizers, spec.logprobs.num_top)
        listener = chunks.queue
    (generation,) = await serving.generations(
        exchange, request.model or "", [spec], lambda _: listener
    )
    for index in range(spec.num_choices):
        events.write(form.role(index))

    def closing() -> list[bytes]:
        log_request(exchange, request, [generation])
        return closing_events(exchange, form, request.include_usage, [generation])

    writer = chunks.run(generation.choices, None) if chunks is not None else None
    await serving.stream(exchange, events, [generation], closing, writer)


def closing_events(
    exchange: Exchange, form: ChunkFormat, include_usage: bool, generations: list[Generation]
) -> list[bytes]:
    """Usage and the way the request went, where asked for, and the end."""
    members: dict[str, Any] = {}
    if include_usage:
        members["usage"] = usage(generations)
    if exchange.traced:
        traces = [trace(exchange, generation) for generation in generations]
        members["rhizome"] = traces[0] if len(traces) == 1 else traces
    return [form.closing(members), DONE] if members else [DONE]
