"""Liveness, models and metrics."""

from __future__ import annotations

import asyncio
import time

from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.common.v1.text_options_pb2 import TextOptions
from rhizome.tokenizer.v1.tokenizer_service_pb2 import TokenizeInput
from services.common.errors import NotFoundError, UnavailableError
from services.gateway.control_plane import ServedModel
from services.gateway.exchange import Exchange, schedule_id
from services.gateway.generation import GenerationSpec
from services.gateway.listeners import WholeText
from services.gateway.serving import Serving

_HEALTH_TIMEOUT_S = 20.0
_STARTED = int(time.time())


async def health(serving: Serving, exchange: Exchange) -> None:
    """GET /health: 200 while a tokenizer and a worker are there to serve a request, and the gateway
    is not stopping.
    """
    if not serving.pipeline.ready:
        raise UnavailableError(_why_not_ready(serving))
    await exchange.reply(200, b"", b"text/plain; charset=utf-8")


async def health_generate(serving: Serving, exchange: Exchange) -> None:
    """GET /health_generate: 200 after a worker has really produced a token."""
    spec = GenerationSpec(
        request_id=exchange.request_id,
        schedule_id=schedule_id(f"health-{exchange.request_id}"),
        input=TokenizeInput(text="Health"),
        sampling=SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True),
        text_options=TextOptions(),
        deadline=time.monotonic() + _HEALTH_TIMEOUT_S,
        span=serving.tracer.decline(),
    )
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            (generation,) = await serving.generations(
                exchange, "default", [spec], lambda _: WholeText()
            )
            await exchange.watched(generation.run())
    except TimeoutError as error:
        raise UnavailableError("no token was generated in time") from error
    if generation.num_output_tokens != 1:
        raise UnavailableError("the worker ended without a token")
    await exchange.reply(200, b"", b"text/plain; charset=utf-8")


async def metrics(serving: Serving, exchange: Exchange) -> None:
    """GET /metrics."""
    accept = ",".join(
        value.decode("latin-1") for name, value in exchange.scope["headers"] if name == b"accept"
    )
    body, content_type = serving.pipeline.metrics.render(accept)
    await exchange.reply(200, body, content_type.encode())


async def models(serving: Serving, exchange: Exchange) -> None:
    """GET /v1/models."""
    served = serving.pipeline.control.table.models
    await exchange.reply_json({"object": "list", "data": [_card(model) for model in served]})


async def model(serving: Serving, exchange: Exchange) -> None:
    """GET /v1/models/{id}."""
    name = exchange.scope["path_params"]["model"]
    for served in serving.pipeline.control.table.models:
        if served.name == name:
            await exchange.reply_json(_card(served))
            return
    raise NotFoundError(f"The model `{name}` does not exist")


def _card(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "rhizome",
        "root": served.name,
        "max_model_len": served.context_length,
    }


def _why_not_ready(serving: Serving) -> str:
    if serving.pipeline.closing:
        return "the gateway is stopping"
    if not serving.pipeline.tokenizers.usable:
        return serving.pipeline.tokenizers.why_unusable()
    return "no worker is ready"
