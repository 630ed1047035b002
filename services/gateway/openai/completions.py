"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from rhizome.common.v1.text_options_pb2 import TextOptions
from rhizome.tokenizer.v1.tokenizer_service_pb2 import TokenizeInput
from services.common.errors import InvalidRequestError
from services.gateway.exchange import EventStream, Exchange, schedule_id
from services.gateway.generation import Choice, ChoiceListener, GenerationSpec
from services.gateway.json_body import decode_body
from services.gateway.listeners import WholeText
from services.gateway.openai.chat import closing_events
from services.gateway.openai.chunks import (
    ChunkFormat,
    LogprobChunks,
    PlainChunks,
    finish_reason,
    matched_stop,
)
from services.gateway.openai.logprobs import CompletionLogprobs, ids_of, join_blocks
from services.gateway.openai.request_log import log_request
from services.gateway.openai.requests import CompletionRequest
from services.gateway.pipeline import Generation
from services.gateway.sampling import check_choices, check_token_ids
from services.gateway.serving import Serving, trace, usage

_decoder = msgspec.json.Decoder(CompletionRequest)

_DEFAULT_MAX_TOKENS = 16
_MAX_PROMPTS = 1024
_MAX_PROMPT_IDS = 10_000_000


async def completions(serving: Serving, exchange: Exchange) -> None:
    """Complete one or more prompts, whole or streaming."""
    request = decode_body(_decoder, await exchange.body())
    if request.rid is not None:
        exchange.use_request_id(request.rid)
    request.check()
    prompts = _prompts(request.prompt)
    specs = [_spec(request, exchange, serving, prompt) for prompt in prompts]
    if request.stream:
        await _stream(serving, exchange, request, specs)
    else:
        await _whole(serving, exchange, request, specs)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A text, a list of texts, a list of ids, or a list of such lists."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequestError(
            "prompt must be a string, a list of strings, a list of token ids, or a list of "
            "lists of token ids",
            "prompt",
        )
    if not prompt:
        raise InvalidRequestError("prompt must not be empty", "prompt")
    if type(prompt[0]) is int:
        check_token_ids("prompt", prompt, _MAX_PROMPT_IDS)
        return [prompt]
    if len(prompt) > _MAX_PROMPTS:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} prompts; at most {_MAX_PROMPTS} are allowed", "prompt"
        )
    if all(isinstance(one, str) for one in prompt):
        return prompt
    for one in prompt:
        if not isinstance(one, list) or not one:
            raise InvalidRequestError(
                "prompt must hold only strings, only token ids, or only non-empty lists of "
                "token ids",
                "prompt",
            )
        check_token_ids("prompt", one, _MAX_PROMPT_IDS)
    return prompt


def _spec(
    request: CompletionRequest, exchange: Exchange, serving: Serving, prompt: str | list[int]
) -> GenerationSpec:
    if isinstance(prompt, str) and not prompt:
        raise InvalidRequestError("prompt must not be empty", "prompt")
    limit = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return GenerationSpec(
        request_id=exchange.request_id,
        schedule_id=schedule_id(exchange.request_id),
        input=TokenizeInput(text=prompt) if isinstance(prompt, str) else None,
        token_ids=() if isinstance(prompt, str) else prompt,
        sampling=request.sampling(limit, "max_tokens"),
        text_options=request.text(),
        logprobs=request.logprob_options(),
        num_choices=check_choices("n", request.n),
        tenant=exchange.tenant,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        session_id=request.session_id or "",
        input_param="prompt",
        deadline=serving.deadline(exchange.arrival_s),
        span=exchange.span,
    )


def _head(serving: Serving, exchange: Exchange, request: CompletionRequest) -> dict[str, Any]:
    model = serving.pipeline.control.table.model(request.model or "")
    return {
        "id": f"cmpl-{exchange.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": f"fp_{model.identity.model_revision[:12]}",
    }


async def _echoes(
    serving: Serving, request: CompletionRequest, specs: Sequence[GenerationSpec]
) -> list[str | None]:
    """The prompts' texts where they are to be sent back."""
    if not request.echo:
        return [None] * len(specs)
    texts: list[str | None] = []
    for spec in specs:
        if spec.input is not None:
            texts.append(spec.input.text)
        else:
            texts.append(
                await serving.pipeline.tokenizers.detokenize(
                    spec.token_ids,
                    TextOptions(skip_special_tokens=spec.text_options.skip_special_tokens)
                    if spec.text_options.HasField("skip_special_tokens")
                    else TextOptions(),
                )
            )
    return texts


async def _whole(
    serving: Serving,
    exchange: Exchange,
    request: CompletionRequest,
    specs: Sequence[GenerationSpec],
) -> None:
    texts = WholeText()
    generations = await serving.generations(exchange, request.model or "", specs, lambda _: texts)
    head = _head(serving, exchange, request)
    echoes = await _echoes(serving, request, specs)
    await serving.run(exchange, generations)
    choices: list[dict[str, Any]] = []
    for generation, echo in zip(generations, echoes, strict=True):
        for choice in generation.choices:
            choices.append(
                {
                    "index": len(choices),
                    "text": (echo or "") + texts.text(choice),
                    "logprobs": await _logprobs(serving, generation, choice, echo),
                    "finish_reason": finish_reason(choice.finish),
                    "matched_stop": matched_stop(choice.finish),
                }
            )
    reply = {**head, "choices": choices, "usage": usage(generations)}
    if exchange.traced:
        traces = [trace(exchange, generation) for generation in generations]
        reply["rhizome"] = traces[0] if len(traces) == 1 else traces
    log_request(exchange, request, generations)
    await exchange.reply_json(reply)


async def _logprobs(
    serving: Serving, generation: Generation, choice: Choice, echo: str | None
) -> dict[str, Any] | None:
    rows = choice.output_logprobs
    if rows is None:
        return None
    options = generation.prompt.spec.logprobs
    assert options is not None, "a choice has rows only where they were asked for"
    form = CompletionLogprobs(options.num_top)
    block: dict[str, Any] | None = None
    # The first choice's prompt rows serve its siblings too.
    prompt_rows = generation.choices[0].prompt_logprobs
    if prompt_rows is not None:
        count = len(prompt_rows)
        pieces = await serving.pipeline.tokenizers.pieces(ids_of(prompt_rows, 0, count))
        block = form.block(prompt_rows, 0, count, pieces, echo)
    count = min(len(rows), len(choice.output_ids))
    pieces = await serving.pipeline.tokenizers.pieces(ids_of(rows, 0, count))
    return join_blocks(block, form.block(rows, 0, count, pieces))


async def _stream(
    serving: Serving,
    exchange: Exchange,
    request: CompletionRequest,
    specs: Sequence[GenerationSpec],
) -> None:
    events = EventStream(exchange, serving.limits.max_client_buffer_bytes, serving.pipeline.metrics)
    form = ChunkFormat(
        _head(serving, exchange, request), chat=False, include_usage=request.include_usage
    )
    n = specs[0].num_choices
    options = specs[0].logprobs
    chunks = [
        LogprobChunks(events, form, i * n, serving.pipeline.tokenizers, options.num_top)
        for i in range(len(specs))
        if options is not None
    ]

    def listener(index: int) -> ChoiceListener:
        return chunks[index].queue if chunks else PlainChunks(events, form, index * n, n)

    generations = await serving.generations(exchange, request.model or "", specs, listener)
    echoes = await _echoes(serving, request, specs)
    if not chunks:
        for index, echo in enumerate(echoes):
            for choice in range(n if echo else 0):
                events.write(form.text(index * n + choice, echo or "", None))

    def closing() -> list[bytes]:
        log_request(exchange, request, generations)
        return closing_events(exchange, form, request.include_usage, generations)

    writer: Coroutine[Any, Any, None] | None = None
    if chunks:
        writer = _write_all(chunks, generations, echoes)
    await serving.stream(exchange, events, generations, closing, writer)


async def _write_all(
    chunks: Sequence[LogprobChunks],
    generations: Sequence[Generation],
    echoes: Sequence[str | None],
) -> None:
    """Prompts are written one after the other; each one's pieces wait in its queue."""
    for writer, generation, echo in zip(chunks, generations, echoes, strict=True):
        await writer.run(generation.choices, echo)
