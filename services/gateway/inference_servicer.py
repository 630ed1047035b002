"""The public gRPC API: the same pipeline as HTTP, one server stream a request."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from typing import Any

import grpc
from grpc import aio

from rhizome.common.v1.logprobs_pb2 import LogprobBlock, LogprobOptions
from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.common.v1.text_options_pb2 import TextOptions
from rhizome.common.v1.usage_pb2 import Usage
from rhizome.inference.v1.inference_service_pb2 import (
    EmbedRequest,
    EmbedResponse,
    Finish,
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
)
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from rhizome.tokenizer.v1.tokenizer_service_pb2 import ChatInput, TokenizeInput
from services.common.errors import InvalidRequestError, RhizomeError, UnimplementedError
from services.common.rpc import MAX_FRAME_BYTES
from services.common.spans import Span
from services.gateway.access import Need
from services.gateway.exchange import (
    AUTHORIZATION_HEADER,
    TENANT_HEADER,
    TENANT_RULE,
    schedule_id,
    valid_request_id,
    valid_tenant,
)
from services.gateway.generation import Choice, GenerationSpec, LogprobRows
from services.gateway.listeners import Piece, PieceQueue
from services.gateway.pipeline import Generation
from services.gateway.sampling import (
    MAX_WORKER_LOGPROBS,
    ParamNames,
    SamplingInput,
    check_choices,
    check_range,
    check_token_ids,
    sampling_params,
    text_options,
)
from services.gateway.serving import Serving
from services.gateway.spans import begin_rpc, describe_answer, describe_request

_GENERATE = "rhizome.inference.v1.InferenceService/Generate"
_NAMES = ParamNames("sampling.max_new_tokens", "sampling.min_new_tokens", "sampling.seed")


class InferenceServicer(InferenceServiceServicer):
    """Answers InferenceService from the pipeline that HTTP uses."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(  # type: ignore[override]
        self,
        request: GenerateRequest,
        context: aio.ServicerContext[GenerateRequest, GenerateResponse],
    ) -> None:
        with self._counted(), self._serving.tracer.begin_call(_GENERATE, context) as span:
            await self._generate(request, context, span)

    async def _generate(
        self,
        request: GenerateRequest,
        context: aio.ServicerContext[GenerateRequest, GenerateResponse],
        span: Span,
    ) -> None:
        arrival_s = time.monotonic()
        tenant = self._admit(context)
        pipeline = self._serving.pipeline
        deadline = _deadline(request, context, self._serving, arrival_s)
        spec = _spec(request, deadline, tenant, span)
        if span.is_recording:
            begin_rpc(span, "chat" if request.HasField("chat") else "text_completion", spec)
            describe_request(span, request.model, [spec])
        (prompt,) = await pipeline.prepare(pipeline.control.table.model(request.model), [spec])
        queue = PieceQueue()
        generation = Generation(pipeline, prompt, queue, arrival_s)
        try:
            with pipeline.admitted([prompt], spec.tenant):
                await _answer(generation, queue, context)
        finally:
            if span.is_recording:
                describe_answer(span, [generation])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """The block is one call: count it by the status it ends with, beside HTTP's requests."""
        status = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED
            raise
        except RhizomeError as error:
            status = error.status
            raise
        except Exception:
            status = grpc.StatusCode.INTERNAL
            raise
        finally:
            self._serving.pipeline.metrics.requests.labels(f"/{_GENERATE}", status.name).inc()

    async def Embed(
        self, request: EmbedRequest, context: aio.ServicerContext[EmbedRequest, EmbedResponse]
    ) -> EmbedResponse:
        self._admit(context)
        raise UnimplementedError("embeddings come in a later release")

    async def ListModels(
        self,
        request: ListModelsRequest,
        context: aio.ServicerContext[ListModelsRequest, ListModelsResponse],
    ) -> ListModelsResponse:
        self._admit(context)
        return ListModelsResponse(
            models=[
                Model(name=model.name, context_length=model.context_length)
                for model in self._serving.pipeline.control.table.models
            ]
        )

    def _admit(self, context: aio.ServicerContext[Any, Any]) -> str:
        """The tenant that the caller acts for. Raises what it may not."""
        tenant, authorization = "", None
        for key, value in context.invocation_metadata() or ():
            if key == TENANT_HEADER:
                tenant = str(value)
                if not valid_tenant(tenant):
                    raise InvalidRequestError(TENANT_RULE, TENANT_HEADER)
            elif key == AUTHORIZATION_HEADER:
                authorization = str(value).encode("latin-1", "replace")
        return self._serving.access.admit(Need.KEY, authorization, tenant)


async def _answer(
    generation: Generation,
    queue: PieceQueue,
    context: aio.ServicerContext[GenerateRequest, GenerateResponse],
) -> None:
    """Run to the end, writing pieces as they come. Cancelling the call cancels it all."""
    work = asyncio.create_task(generation.run())
    writing = asyncio.create_task(_write_pieces(generation, queue, context))
    try:
        await asyncio.wait({work, writing}, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            writing.result()
        await work
        await writing
        await context.write(
            GenerateResponse(
                request_id=generation.prompt.spec.request_id,
                usage=Usage(
                    prompt_tokens=len(generation.prompt.token_ids),
                    completion_tokens=generation.num_output_tokens,
                    cached_tokens=generation.cached_tokens,
                ),
            )
        )
    finally:
        for task in (work, writing):
            task.cancel()
        await asyncio.gather(work, writing, return_exceptions=True)


async def _write_pieces(
    generation: Generation,
    queue: PieceQueue,
    context: aio.ServicerContext[GenerateRequest, GenerateResponse],
) -> None:
    """One response for each piece; a slow caller holds back only its own queue."""
    num_sent: dict[Choice, int] = {}
    num_logprobs: dict[Choice, int] = {}
    async for piece in queue.pieces(len(generation.choices)):
        choice = piece.choice
        stop = min(piece.ids_consumed, len(choice.output_ids))
        start = num_sent.get(choice, 0)
        if (prompt_rows := choice.prompt_logprobs) is not None and choice not in num_sent:
            for block in _fragments(prompt_rows):
                await context.write(
                    GenerateResponse(
                        request_id=generation.prompt.spec.request_id,
                        choice_index=choice.index,
                        prompt_logprobs=block,
                    )
                )
        response = GenerateResponse(
            request_id=generation.prompt.spec.request_id,
            choice_index=choice.index,
            text=piece.text,
            token_ids=choice.output_ids[start:stop],
            finish=_finish(choice) if piece.ended else None,
        )
        if (rows := choice.output_logprobs) is not None:
            first = num_logprobs.get(choice, 0)
            last = min(stop, len(rows))
            response.logprobs.CopyFrom(_block(rows, first, last))
            num_logprobs[choice] = last
        num_sent[choice] = stop
        if _says_something(response, piece):
            await context.write(response)


def _says_something(response: GenerateResponse, piece: Piece) -> bool:
    return bool(response.text or response.token_ids) or piece.ended


def _finish(choice: Choice) -> Finish:
    assert choice.finish is not None, "an ended choice has a finish"
    finish = Finish(reason=choice.finish.reason)
    if choice.finish.matched_stop is not None:
        finish.matched_stop = choice.finish.matched_stop
    elif choice.finish.matched_token_id is not None:
        finish.matched_token_id = choice.finish.matched_token_id
    return finish


def _fragments(rows: LogprobRows) -> Iterator[LogprobBlock]:
    """All rows, in blocks that any client's limit on a message's size allows."""
    # An id takes at most 5 bytes and a value 4.
    row_bytes = 9 * (1 + rows.num_top) + 4 * rows.num_requested
    step = max(1, MAX_FRAME_BYTES // row_bytes - 1)
    for start in range(0, len(rows), step):
        yield _block(rows, start, min(start + step, len(rows)))


def _block(rows: LogprobRows, start: int, stop: int) -> LogprobBlock:
    k, requested = rows.num_top, rows.num_requested
    return LogprobBlock(
        start_position=rows.start_position + start,
        token_ids=rows.token_ids[start:stop],
        logprobs=rows.logprobs[start:stop],
        num_top=k,
        top_token_ids=rows.top_token_ids[start * k : stop * k],
        top_logprobs=rows.top_logprobs[start * k : stop * k],
        requested_logprobs=rows.requested_logprobs[start * requested : stop * requested],
    )


def _spec(
    request: GenerateRequest, deadline: float | None, tenant: str, span: Span
) -> GenerationSpec:
    kind = request.WhichOneof("input")
    if kind is None or (kind == "text" and not request.text):
        raise InvalidRequestError("input is empty: give text, chat or token_ids", "input")
    request_id = request.request_id or secrets.token_hex(16)
    if not valid_request_id(request_id):
        raise InvalidRequestError(
            "request_id must be short and of printable ASCII characters", "request_id"
        )
    return GenerationSpec(
        request_id=request_id,
        schedule_id=schedule_id(request_id),
        input=_input(request, kind),
        token_ids=list(request.token_ids.ids),
        sampling=_sampling(request.sampling),
        text_options=_text_options(request.text_options),
        logprobs=_logprobs(request.logprobs) if request.HasField("logprobs") else None,
        num_choices=check_choices("n", request.n if request.HasField("n") else None),
        tenant=tenant,
        priority=request.priority,
        cache_salt=request.cache_salt,
        input_param=kind,
        min_tokens_param=_NAMES.min_new_tokens,
        deadline=deadline,
        span=span,
    )


def _logprobs(given: LogprobOptions) -> LogprobOptions:
    check_range("logprobs.num_top", given.num_top, 0, MAX_WORKER_LOGPROBS)
    check_token_ids("logprobs.token_ids", given.token_ids, MAX_WORKER_LOGPROBS)
    return given


def _input(request: GenerateRequest, kind: str) -> TokenizeInput | None:
    if kind == "token_ids":
        return None
    if kind == "text":
        return TokenizeInput(text=request.text)
    chat = request.chat
    if not chat.messages:
        raise InvalidRequestError("chat.messages must not be empty", "chat.messages")
    return TokenizeInput(
        chat=ChatInput(
            messages=chat.messages,
            tools_json=chat.tools_json,
            template_kwargs_json=chat.template_kwargs_json,
            add_generation_prompt=not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
        )
    )


def _sampling(given: SamplingParams) -> SamplingParams:
    """Checked as over HTTP."""
    constraint = given.WhichOneof("constraint")
    if constraint is not None:
        raise InvalidRequestError(
            f"sampling.{constraint} is not supported", f"sampling.{constraint}"
        )
    if len(given.logit_bias_ids) != len(given.logit_bias_values):
        raise InvalidRequestError(
            "sampling.logit_bias_ids and logit_bias_values differ in length",
            "sampling.logit_bias_ids",
        )

    def optional(name: str) -> Any:
        return getattr(given, name) if given.HasField(name) else None  # type: ignore[arg-type]

    bias = zip(given.logit_bias_ids, given.logit_bias_values, strict=True)
    return sampling_params(
        SamplingInput(
            names=_NAMES,
            temperature=optional("temperature"),
            top_p=optional("top_p"),
            top_k=optional("top_k"),
            min_p=optional("min_p"),
            repetition_penalty=optional("repetition_penalty"),
            frequency_penalty=optional("frequency_penalty"),
            presence_penalty=optional("presence_penalty"),
            max_new_tokens=optional("max_new_tokens"),
            min_new_tokens=optional("min_new_tokens"),
            stop_token_ids=list(given.stop_token_ids),
            ignore_eos=optional("ignore_eos"),
            logit_bias={str(token_id): value for token_id, value in bias},
            seed=optional("seed"),
        )
    )


def _text_options(given: TextOptions) -> TextOptions:
    checked = text_options(list(given.stop))
    checked.MergeFrom(given)
    del checked.stop[:]
    checked.stop.extend(given.stop)
    return checked


def _deadline(
    request: GenerateRequest,
    context: aio.ServicerContext[GenerateRequest, GenerateResponse],
    serving: Serving,
    arrival_s: float,
) -> float | None:
    """The earliest of the call's own, the request's and the operator's."""
    limits = [serving.deadline(arrival_s)]
    if request.HasField("timeout"):
        timeout_s = request.timeout.ToNanoseconds() / 1e9
        if timeout_s <= 0:
            raise InvalidRequestError("timeout must be positive", "timeout")
        limits.append(arrival_s + timeout_s)
    remaining = context.time_remaining()
    if remaining is not None:
        limits.append(arrival_s + remaining)
    return min((limit for limit in limits if limit is not None), default=None)
