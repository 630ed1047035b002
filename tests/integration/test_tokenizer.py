"""The tokenizer service over gRPC: unary calls, text sessions, the process."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer

from rhizome.tokenizer.v1 import (
    tokenizer_service_pb2 as pb,
    tokenizer_service_pb2_grpc as pb_grpc,
)
from services.common.errors import InvalidRequestError, error_from_rpc
from services.common.model_files import (
    builtin_model_path,
    chat_template_digest,
    eos_token_ids,
    tokenizer_digest,
)
from services.common.prefix_hash import HASH_VERSION, prefix_hashes
from services.common.rpc import open_channel, running_server
from services.tokenizer.load import load_parts
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.servicer import TokenizerParts, TokenizerServicer, tokenize

MODEL = builtin_model_path()
SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"]


@pytest.fixture(scope="module")
def parts() -> TokenizerParts:
    return load_parts()


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


async def connected(
    parts: TokenizerParts, metrics: TokenizerMetrics | None = None
) -> AsyncIterator[Any]:
    with ThreadPoolExecutor(2) as pool:
        servicer = TokenizerServicer(parts, pool, metrics or TokenizerMetrics())
        async with (
            running_server(
                lambda server: pb_grpc.add_TokenizerServiceServicer_to_server(servicer, server),
                [SERVICE],
                "localhost:0",
            ) as server,
            open_channel(f"localhost:{server.port}") as channel,
        ):
            yield pb_grpc.TokenizerServiceStub(channel)


@pytest.fixture
async def stub(parts: TokenizerParts) -> AsyncIterator[Any]:
    async for connection in connected(parts):
        yield connection


def chat(*messages: tuple[str, str], **fields: Any) -> pb.TokenizeInput:
    entry = pb.TokenizeInput()
    for role, content in messages:
        entry.chat.messages.add(role=role, content=content)
    entry.chat.MergeFrom(pb.ChatInput(**fields))
    return entry


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_a_batch_is_tokenized_in_order_and_hashed(stub: Any, reference: Tokenizer) -> None:
    text = "The capital of France is Paris. " * 20
    request = pb.TokenizeRequest(namespace="rev//", page_size=16)
    request.inputs.add(text=text)
    request.inputs.append(chat(("user", "Hi")))
    request.inputs.add(text="")
    results = (await stub.Tokenize(request)).results
    assert list(results[0].token_ids)[-5:] == reference.encode(text).ids[-5:]
    for result in results:
        assert list(result.prefix_hashes) == prefix_hashes(list(result.token_ids), 16, "rev//")
    rendered = reference.decode(list(results[1].token_ids), skip_special_tokens=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert not results[1].template_stop
    no_hashes = await stub.Tokenize(pb.TokenizeRequest(inputs=[pb.TokenizeInput(text=text)]))
    assert not no_hashes.results[0].prefix_hashes


async def test_text_that_comes_back_is_the_text_that_went_in(stub: Any) -> None:
    text = "Grüße 今日 👩‍👩‍👧 \n\t <|im_end|> \x00 end"
    tokenize = pb.TokenizeRequest()
    tokenize.inputs.add(text=text, add_special_tokens=False)
    token_ids = (await stub.Tokenize(tokenize)).results[0].token_ids
    request = pb.DetokenizeRequest(sequences=[pb.TokenSequence(token_ids=token_ids)])
    request.options.skip_special_tokens = False
    assert (await stub.Detokenize(request)).results[0].text == text
    request.as_pieces = True
    [result] = (await stub.Detokenize(request)).results
    assert result.text == ""
    assert len(result.pieces) == len(token_ids)
    assert b"".join(result.pieces) == text.encode()


def test_what_fits_no_message_is_too_long_and_not_an_overload(parts: TokenizerParts) -> None:
    request = pb.TokenizeRequest(page_size=16)
    request.inputs.add(text="short")
    request.inputs.add(text="The capital of France is Paris. " * 200)
    needed = tokenize(parts, request).ByteSize()
    tokenize(parts, request, max_bytes=needed + 100)
    with pytest.raises(InvalidRequestError, match="input 1: the prompt is too long"):
        tokenize(parts, request, max_bytes=needed - 1)


@pytest.mark.parametrize(
    ("entry", "param", "message"),
    [
        (pb.TokenizeInput(), None, "input 1: neither text nor chat"),
        (chat(("user", "a"), tools_json="{"), "tools", "input 1: tools_json is not valid JSON"),
        (chat(("user", "a"), tools_json="{}"), "tools", "not a JSON array"),
        (chat(("user", "a"), template_kwargs_json="[]"), "chat_template_kwargs", "JSON object"),
        (chat(("user", "a"), template_kwargs_json='{"messages": 1}'), "chat_template_kwargs", "1:"),
        (
            chat(("user", "a"), continue_final_message=True, add_generation_prompt=True),
            "continue_final_message",
            "exclude each other",
        ),
        (chat(continue_final_message=True), "messages", "no final message"),
    ],
)
async def test_bad_inputs_are_refused_by_index_and_parameter(
    stub: Any, entry: pb.TokenizeInput, param: str | None, message: str
) -> None:
    request = pb.TokenizeRequest(inputs=[pb.TokenizeInput(text="fine"), entry])
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.Tokenize(request)
    error = error_from_rpc(caught.value)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.message
    assert getattr(error, "param", None) == param


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{", "messages[0].extra_json is not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("7", "not a JSON object"),
        ('{"content": 7}', "messages[0].content"),
        ('{"content": [{"type": "image_url"}]}', "'image_url'"),
        ('{"content": "\\ud800"}', "lone surrogate"),
    ],
    ids=["malformed", "deep", "number", "content", "image", "surrogate"],
)
async def test_bad_messages_are_refused(stub: Any, extra: str, message: str) -> None:
    request = pb.TokenizeRequest(inputs=[chat(("user", "a"))])
    request.inputs[0].chat.messages[0].extra_json = extra
    code, details = await status_of(stub.Tokenize(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message in details
    assert "input 0: " in details


async def test_extra_members_reach_the_template(stub: Any, reference: Tokenizer) -> None:
    request = pb.TokenizeRequest(inputs=[chat(("user", "ignored"))])
    parts = [{"type": "text", "text": "from "}, {"type": "text", "text": "parts"}]
    request.inputs[0].chat.messages[0].extra_json = json.dumps({"content": parts, "name": None})
    [result] = (await stub.Tokenize(request)).results
    assert "from parts" in reference.decode(list(result.token_ids))


async def test_ids_outside_the_vocabulary_are_refused_by_sequence(stub: Any) -> None:
    request = pb.DetokenizeRequest(
        sequences=[pb.TokenSequence(token_ids=[5]), pb.TokenSequence(token_ids=[2**32 - 1])]
    )
    code, details = await status_of(stub.Detokenize(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "sequence 1: id 4294967295" in details


async def test_the_info_has_the_digests_that_other_services_compute(stub: Any) -> None:
    info = await stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest())
    assert info.tokenizer_digest == tokenizer_digest(MODEL)
    assert info.template_digest == chat_template_digest(MODEL, None)
    assert info.hash_version == HASH_VERSION
    assert list(info.eos_token_ids) == eos_token_ids(MODEL, MODEL)
    assert info.has_chat_template
    assert info.vocab_size > max(info.eos_token_ids)
    assert info.HasField("bos_token_id")


async def test_without_a_template_chats_are_refused_and_text_works(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    async for stub in connected(load_parts(tmp_path)):
        request = pb.TokenizeRequest(inputs=[chat(("user", "a"))])
        code, details = await status_of(stub.Tokenize(request))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "no chat template; start the tokenizer with --chat-template" in details
        info = await stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest())
        assert not info.has_chat_template
        assert info.template_digest == ""
        await stub.Tokenize(pb.TokenizeRequest(inputs=[pb.TokenizeInput(text="a")]))


async def test_a_builtin_template_brings_its_stop_strings(reference: Tokenizer) -> None:
    async for stub in connected(load_parts(chat_template="vicuna_v1.1")):
        request = pb.TokenizeRequest(inputs=[chat(("system", "S"), ("user", "Hi"))])
        [result] = (await stub.Tokenize(request)).results
        assert reference.decode(list(result.token_ids)) == "S USER: Hi ASSISTANT:"
        assert not result.template_stop
    async for stub in connected(load_parts(chat_template="chatml")):
        [result] = (await stub.Tokenize(request)).results
        assert list(result.template_stop) == ["<|endoftext|>", "<|im_end|>"]


async def test_a_session_streams_many_handles_to_their_ends(
    stub: Any, reference: Tokenizer
) -> None:
    texts = {handle: f"Grüße {handle} 今日 👩‍👧 {'x' * handle}" for handle in range(1, 33)}
    ids = {handle: reference.encode(text).ids for handle, text in texts.items()}
    call = stub.StreamText()
    await call.write(pb.StreamTextRequest(opens=[pb.OpenText(handle=h) for h in texts]))
    await call.read()
    received = dict.fromkeys(texts, "")
    ended = []
    for step in range(max(map(len, ids.values())) + 1):
        request = pb.StreamTextRequest()
        for handle, token_ids in ids.items():
            if step < len(token_ids):
                request.handles.append(handle)
                request.id_offsets.append(step)
                request.num_ids.append(1)
                request.token_ids.append(token_ids[step])
            elif step == len(token_ids):
                request.finishes.append(handle)
        await call.write(request)
        response = await call.read()
        for handle, text in zip(response.handles, response.texts, strict=True):
            received[handle] += text
        ended += [end.handle for end in response.ends]
    await call.done_writing()
    assert await call.read() is aio.EOF
    assert received == texts
    assert sorted(ended) == list(texts)


async def test_a_gap_ends_the_session_and_no_other(stub: Any) -> None:
    broken, fine = stub.StreamText(), stub.StreamText()
    opening = pb.StreamTextRequest(opens=[pb.OpenText(handle=1)])
    for call in (broken, fine):
        await call.write(opening)
        await call.read()
    gap = pb.StreamTextRequest(handles=[1], id_offsets=[3], num_ids=[1], token_ids=[70])
    await broken.write(gap)
    code, details = await status_of(broken.read())
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "ids 0 to 2 are missing" in details
    gap.id_offsets[0] = 0
    await fine.write(gap)
    assert len((await fine.read()).texts) == 1
    fine.cancel()


async def test_a_session_moves_to_another_call_in_the_middle_of_a_character(
    stub: Any, reference: Tokenizer
) -> None:
    text = "a 👩‍👩‍👧 b"
    token_ids = reference.encode(text).ids
    for taken in range(len(token_ids) + 1):
        received = ""
        for start, end in ((0, taken), (taken, len(token_ids))):
            opening = pb.OpenText(
                handle=1, replay_ids=token_ids[:start], emitted_bytes=len(received.encode())
            )
            request = pb.StreamTextRequest(
                opens=[opening],
                handles=[1],
                id_offsets=[start],
                num_ids=[end - start],
                token_ids=token_ids[start:end],
            )
            call = stub.StreamText()
            await call.write(request)
            received += "".join((await call.read()).texts)
            call.cancel()
        assert received == text


async def test_a_reader_that_stops_holds_back_only_its_own_session(stub: Any) -> None:
    """The server takes in no more than it can send: a stuck session's memory is bounded."""
    stuck, fine = stub.StreamText(), stub.StreamText()
    token_ids = [70] * 20_000
    sent = 0

    async def flood() -> None:
        nonlocal sent
        await stuck.write(pb.StreamTextRequest(opens=[pb.OpenText(handle=1)]))
        while True:
            request = pb.StreamTextRequest(
                handles=[1], id_offsets=[sent], num_ids=[len(token_ids)], token_ids=token_ids
            )
            await stuck.write(request)
            sent += len(token_ids)

    flooding = asyncio.create_task(flood())
    previous = -1
    while sent != previous:
        previous = sent
        await asyncio.sleep(0.3)
    await fine.write(pb.StreamTextRequest(opens=[pb.OpenText(handle=1)], finishes=[1]))
    assert len((await fine.read()).ends) == 1
    assert not flooding.done()
    flooding.cancel()
    stuck.cancel()
    fine.cancel()


async def test_the_process_serves_until_told_to_stop(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/tokenizer.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.tokenizer", "--listen", address, cwd=Path.cwd()
    )
    try:
        async with open_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
            reply = await health.Check(request, wait_for_ready=True, timeout=60)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            stub: Any = pb_grpc.TokenizerServiceStub(channel)
            assert (await stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest())).vocab_size > 0
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--chat-template", "lama-2"], 3, "neither a file nor one of"),
        (["--model-path", "/nonexistent"], 3, "no tokenizer.json in /nonexistent"),
        (["--num-encode-threads", "0"], 2, "num_encode_threads must be >= 1"),
        (["--no-such-flag"], 2, "--no-such-flag"),
    ],
)
async def test_bad_flags_end_the_process_with_a_reason(
    flags: list[str], status: int, message: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.tokenizer", *flags),
        cwd=Path.cwd(),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == status
    assert message in errors.decode()
    assert "Traceback" not in errors.decode()


async def test_metrics_tell_calls_by_their_end_and_count_tokens(parts: TokenizerParts) -> None:
    metrics = TokenizerMetrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"rhizome_tokenizer_{name}", labels)

    async for stub in connected(parts, metrics):
        short, long = pb.TokenizeInput(text="one two"), pb.TokenizeInput(text="word " * 400)
        responses = [
            await stub.Tokenize(pb.TokenizeRequest(inputs=[text])) for text in (short, long)
        ]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Tokenize(pb.TokenizeRequest(inputs=[pb.TokenizeInput()]))
        await stub.Detokenize(pb.DetokenizeRequest(sequences=[pb.TokenSequence(token_ids=[300])]))
        stream = stub.StreamText()
        await stream.write(pb.StreamTextRequest())
        while value("text_streams") != 1:
            await asyncio.sleep(0.01)
        stream.cancel()
        while value("text_streams"):
            await asyncio.sleep(0.01)
    assert value("calls_total", method="tokenize", outcome="ok") == 2
    assert value("calls_total", method="tokenize", outcome="refused") == 1
    assert value("calls_total", method="detokenize", outcome="ok") == 1
    assert value("seconds_count", method="tokenize") == 3
    num_tokens = sum(len(response.results[0].token_ids) for response in responses)
    assert value("prompt_tokens_total") == num_tokens > 400
    assert value("waiting_calls") == 0
