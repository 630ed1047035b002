"""What SGLang's tools ask a server about itself, and the cache flush they send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from rhizome.worker.v1.worker_service_pb2 import (
    FlushCacheRequest,
    GetWorkerInfoRequest,
    GetWorkerInfoResponse,
)
from services.gateway.exchange import Exchange
from services.gateway.native.workers import ask_workers
from services.gateway.serving import Serving

if TYPE_CHECKING:
    from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

_TIMEOUT_S = 5.0


async def model_info(serving: Serving, exchange: Exchange) -> None:
    """GET /get_model_info and /model_info."""
    model = serving.pipeline.control.table.model("")
    workers = await ask_workers(serving, _get_info)
    tokenizer = serving.pipeline.tokenizers.info
    await exchange.reply_json(
        {
            "model_path": workers[0].model_path,
            "served_model_name": model.name,
            "tokenizer_path": tokenizer.tokenizer_path if tokenizer is not None else None,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
        }
    )


async def server_info(serving: Serving, exchange: Exchange) -> None:
    """GET /get_server_info and /server_info."""
    model = serving.pipeline.control.table.model("")
    workers = await ask_workers(serving, _get_info)
    tokenizer = serving.pipeline.tokenizers.info
    first = workers[0]
    await exchange.reply_json(
        {
            "model_path": first.model_path,
            "served_model_name": model.name,
            "tokenizer_path": tokenizer.tokenizer_path if tokenizer is not None else None,
            "context_length": model.context_length,
            "page_size": model.identity.page_size,
            "tp_size": first.tp_size,
            "dp_size": len(workers),
            "dtype": first.dtype,
            "device": first.device,
            "attention_backend": first.attention_backend,
            "max_running_requests": sum(info.max_running_sequences for info in workers),
            "max_total_num_tokens": sum(
                info.num_pages * info.identity.page_size for info in workers
            ),
            "internal_states": [_state(info) for info in workers],
        }
    )


async def flush_cache(serving: Serving, exchange: Exchange) -> None:
    """GET and POST /flush_cache: every worker drops the pages that no sequence uses."""
    flushed = await ask_workers(serving, _flush)
    await exchange.reply(
        200,
        f"Cache flushed: {sum(flushed)} pages on {len(flushed)} workers.\n".encode(),
        b"text/plain; charset=utf-8",
    )


def _state(info: GetWorkerInfoResponse) -> dict[str, Any]:
    load = MessageToDict(
        info.load, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"worker_id": info.worker_id, **{name: int(value) for name, value in load.items()}}


async def _get_info(stub: WorkerServiceAsyncStub) -> GetWorkerInfoResponse:
    return await stub.GetWorkerInfo(GetWorkerInfoRequest(), timeout=_TIMEOUT_S)


async def _flush(stub: WorkerServiceAsyncStub) -> int:
    response = await stub.FlushCache(FlushCacheRequest(), timeout=_TIMEOUT_S)
    return response.num_freed_pages
