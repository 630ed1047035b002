"""The public gRPC API: the same pipeline, one server stream a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from rhizome.common.v1.chat_message_pb2 import ChatMessage
from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from rhizome.common.v1.logprobs_pb2 import LogprobOptions
from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.common.v1.text_options_pb2 import TextOptions
from rhizome.inference.v1 import inference_service_pb2 as pb
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.rpc import MAX_FRAME_BYTES, open_channel
from tests.fakes.gateway_stack import (
    ANSWER,
    GatewayStack,
    answer_ids,
    gateway_stack,
    reference_tokenizer,
    until,
)
from tests.fakes.scripted_worker import CONTEXT_LENGTH, logprob_of


@pytest.fixture
async def stack() -> AsyncIterator[GatewayStack]:
    async with gateway_stack() as running:
        yield running


@pytest.fixture
async def stub(stack: GatewayStack) -> AsyncIterator[Any]:
    async with open_channel(stack.grpc_address) as channel:
        yield InferenceServiceStub(channel)


async def generate(stub: Any, **fields: Any) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(pb.GenerateRequest(**fields))]


async def test_a_chat_streams_text_ids_finish_and_usage(stub: Any) -> None:
    responses = await generate(
        stub,
        chat=pb.ChatInput(messages=[ChatMessage(role="user", content="Hello")]),
        request_id="mine",
    )
    assert "".join(response.text for response in responses) == ANSWER
    assert [i for response in responses for i in response.token_ids] == answer_ids()
    assert responses[-2].finish.reason == FINISH_REASON_STOP
    assert responses[-2].finish.matched_token_id == answer_ids()[-1]
    assert responses[-1].usage.completion_tokens == len(answer_ids())
    assert {response.request_id for response in responses} == {"mine"}


async def test_choices_logprobs_and_stop_strings(stub: Any) -> None:
    ids = reference_tokenizer().encode("The capital").ids
    responses = await generate(
        stub,
        token_ids=pb.TokenIds(ids=ids),
        n=2,
        sampling=SamplingParams(max_new_tokens=4),
        logprobs=LogprobOptions(output=True, prompt_start=1),
    )
    texts = ["", ""]
    logprobs: list[list[float]] = [[], []]
    finishes = [0, 0]
    for response in responses[:-1]:
        texts[response.choice_index] += response.text
        logprobs[response.choice_index] += response.logprobs.logprobs
        finishes[response.choice_index] = max(
            finishes[response.choice_index], response.finish.reason
        )
    expected = answer_ids()[:4]
    assert texts == [reference_tokenizer().decode(expected)] * 2
    assert logprobs == [[logprob_of(i) for i in expected]] * 2
    assert finishes == [FINISH_REASON_LENGTH] * 2
    prompts = [list(r.prompt_logprobs.token_ids) for r in responses if r.choice_index == 0]
    assert [block for block in prompts if block] == [ids[1:]]
    stopped = await generate(stub, text="x", text_options=TextOptions(stop=["river"]))
    assert stopped[-2].finish.matched_stop == "river"


async def test_prompt_log_probabilities_come_in_messages_of_any_clients_size(stub: Any) -> None:
    ids = [1 + i % 200 for i in range(CONTEXT_LENGTH - 4)]
    responses = await generate(
        stub,
        token_ids=pb.TokenIds(ids=ids),
        sampling=SamplingParams(max_new_tokens=2),
        logprobs=LogprobOptions(output=True, prompt_start=0, num_top=64, token_ids=list(range(64))),
    )
    assert max(response.ByteSize() for response in responses) <= MAX_FRAME_BYTES
    blocks = [r.prompt_logprobs for r in responses if r.prompt_logprobs.token_ids]
    assert len(blocks) > 1
    assert [i for block in blocks for i in block.token_ids] == ids
    assert [b.start_position for b in blocks] == [
        sum(len(b.token_ids) for b in blocks[:i]) for i in range(len(blocks))
    ]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "input"),
        ({"text": "x", "n": 0}, grpc.StatusCode.INVALID_ARGUMENT, "[1, 128]"),
        (
            {"text": "x", "sampling": SamplingParams(top_p=2)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "top_p",
        ),
        (
            {"text": "x", "sampling": SamplingParams(regex="a")},
            grpc.StatusCode.INVALID_ARGUMENT,
            "regex",
        ),
        (
            {"text": "x", "logprobs": LogprobOptions(num_top=65)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "logprobs.num_top",
        ),
        (
            {"text": "x", "logprobs": LogprobOptions(token_ids=[1] * 65)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "logprobs.token_ids",
        ),
        ({"text": "x", "model": "none" * 10_000}, grpc.StatusCode.NOT_FOUND, "nonenone"),
        ({"text": "x", "model": "none"}, grpc.StatusCode.NOT_FOUND, "none"),
        (
            {"text": "x", "timeout": Duration(nanos=1)},
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "",
        ),
    ],
)
async def test_bad_requests_get_a_status_that_says_why(
    stub: Any, fields: dict[str, Any], status: grpc.StatusCode, message: str
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await generate(stub, **fields)
    assert caught.value.code() is status
    assert message in (caught.value.details() or "")


async def test_cancelling_the_call_frees_the_sequence(stub: Any, stack: GatewayStack) -> None:
    stack.workers[0].step_s = 0.05
    call = stub.Generate(pb.GenerateRequest(text="x", sampling=SamplingParams(ignore_eos=True)))
    await call.read()
    call.cancel()
    await until(lambda: stack.workers[0].num_cancels == 1 and stack.workers[0].num_live == 0)


async def test_models_are_listed_and_embeddings_are_not_there_yet(stub: Any) -> None:
    models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [model.name for model in models] == ["scripted"]
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.Embed(pb.EmbedRequest(texts=["x"]))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
