"""The worker's multiplexed sessions over real gRPC, with a fake engine behind real sockets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from rhizome.common.v1 import finish_reason_pb2, logprobs_pb2, pool_identity_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.rpc import MAX_FRAME_BYTES
from tests.fakes.fake_engine import expected_output
from tests.fakes.session_client import PROTOCOL, make_submit
from tests.fakes.worker_bench import EPOCH, Bench, running_bench, until, until_idle

PROMPT = [5, 6, 7]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_bench() as running:
        yield running


async def test_sequences_stream_to_their_end(bench: Bench) -> None:
    client = bench.client()
    opened = await client.open(epoch=EPOCH)
    assert (opened.epoch, opened.protocol_revision, opened.resumed) == (EPOCH, 1, False)
    prompts = {handle: [handle, 2, 3] for handle in range(40)}
    await client.submit(*(make_submit(handle, ids) for handle, ids in prompts.items()))
    await client.ended()
    for handle, prompt in prompts.items():
        received = client.handles[handle]
        assert received.ids == expected_output(prompt, 8)
        assert received.admissions == 1
        assert received.finish is not None
        assert received.finish.reason == finish_reason_pb2.FINISH_REASON_LENGTH
    assert (await bench.info()).load.num_handles == 40
    await client.send(closes=list(prompts))
    await client.break_off()
    await until_idle(bench)


async def test_a_step_is_one_frame(bench: Bench) -> None:
    bench.engine.step_s = 0.005
    client = bench.client()
    await client.open()
    await client.submit(*(make_submit(handle, PROMPT) for handle in range(100)))
    await client.ended()
    assert client.num_frames <= 9


async def test_cancelling_ends_a_handle_once_and_frees_its_pages(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    first, second = await client.submit(
        make_submit(1, PROMPT, max_new_tokens=2000), make_submit(2, PROMPT, max_new_tokens=30)
    )
    await until(lambda: len(first.ids) > 3)
    await client.send(cancels=[1, 1])
    await client.send(cancels=[1])
    await client.ended()
    assert first.finish is not None
    assert first.finish.reason == finish_reason_pb2.FINISH_REASON_CANCELLED
    assert second.ids == expected_output(PROMPT, 30)
    await client.send(closes=[1, 2], cancels=[1])
    await client.send(closes=[1, 2])
    await client.break_off()
    await until_idle(bench)


async def test_a_submit_sent_twice_runs_once(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    submit = make_submit(3, PROMPT)
    await client.send(submits=[submit])
    await client.submit(submit)
    await client.ended()
    await client.send(closes=[3])
    await client.send(submits=[submit])
    (last,) = await client.submit(make_submit(4, PROMPT))
    await client.ended([4])
    assert last.ids == expected_output(PROMPT, 8)
    assert (await bench.info()).load.num_handles == 1


async def test_a_long_prompt_arrives_in_fragments(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    prompt = [i % 1000 for i in range(3000)]
    submit = make_submit(1, prompt)
    del submit.token_ids[1000:]
    (received,) = await client.submit(submit)
    await client.send(
        id_fragments=[pb.IdFragment(handle=1, offset=1000, token_ids=prompt[1000:2000])]
    )
    # Overlaps what has come already.
    await client.send(id_fragments=[pb.IdFragment(handle=1, offset=1500, token_ids=prompt[1500:])])
    await client.ended()
    assert received.ids == expected_output(prompt, 8)


async def test_a_gap_in_fragments_fails_the_session(bench: Bench) -> None:
    client = bench.client()
    await client.open(read=False)
    submit = make_submit(1, [1, 2, 3, 4])
    del submit.token_ids[1:]
    await client.submit(submit)
    await client.send(id_fragments=[pb.IdFragment(handle=1, offset=2, token_ids=[3])])
    assert await client.call.code() is grpc.StatusCode.ABORTED
    await until_idle(bench)


@pytest.mark.parametrize(
    ("opening", "code"),
    [
        ({"epoch": 1}, grpc.StatusCode.FAILED_PRECONDITION),
        (
            {"protocol": pool_identity_pb2.ProtocolRange(min_revision=9, max_revision=9)},
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        ({"session_id": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"resume_handles": [1]}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_wrong_opening_is_refused(
    bench: Bench, opening: dict[str, Any], code: grpc.StatusCode
) -> None:
    fields = {"gateway_id": "g", "session_id": "s", "protocol": PROTOCOL, **opening}
    call = bench.stub.Connect()
    await call.write(pb.ConnectRequest(open=pb.OpenSession(**fields)))
    assert await call.code() is code


async def test_a_message_before_open_is_refused(bench: Bench) -> None:
    call = bench.stub.Connect()
    await call.write(pb.ConnectRequest(cancels=[1]))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bad_submits_are_entries_and_leave_the_stream_alone(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    huge = make_submit(2, PROMPT)
    huge.num_token_ids = huge.prompt_len = 4096
    unknown_id = make_submit(3, [5, 1000])
    greedy = make_submit(4, PROMPT)
    greedy.sampling.temperature = float("nan")
    late = make_submit(5, PROMPT, remaining=Duration(seconds=0))
    many = make_submit(6, PROMPT, logprobs=logprobs_pb2.LogprobOptions(output=True, num_top=65))
    good = make_submit(7, PROMPT)
    await client.submit(huge, unknown_id, greedy, late, many, good)
    await client.ended()
    errors = {h: r.error.code for h, r in client.handles.items() if r.error is not None}
    invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    expired = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert errors == {2: invalid, 3: invalid, 4: invalid, 5: expired, 6: invalid}
    error = client.handles[4].error
    assert error is not None
    assert "temperature" in error.message
    assert client.handles[7].ids == expected_output(PROMPT, 8)


async def test_a_deadline_ends_only_its_sequence(bench: Bench) -> None:
    bench.engine.step_s = 0.005
    client = bench.client()
    await client.open()
    late, other = await client.submit(
        make_submit(1, PROMPT, max_new_tokens=4000, remaining=Duration(nanos=60_000_000)),
        make_submit(2, PROMPT, max_new_tokens=40),
    )
    await client.ended()
    assert late.error is not None
    assert late.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert other.ids == expected_output(PROMPT, 40)


async def test_a_broken_call_resumes_where_it_stopped(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    options = logprobs_pb2.LogprobOptions(output=True, prompt_start=0)
    first, second = await client.submit(
        make_submit(1, PROMPT, max_new_tokens=60, logprobs=options),
        make_submit(2, PROMPT, max_new_tokens=60, output=expected_output(PROMPT, 4)),
    )
    third, fourth = await client.submit(
        make_submit(3, PROMPT, max_new_tokens=4000), make_submit(4, PROMPT, max_new_tokens=2)
    )
    for _ in range(3):
        seen = len(first.ids)
        await until(lambda seen=seen: len(first.ids) > seen + 5)  # type: ignore[misc]
        await client.break_off()
        await asyncio.sleep(0.02)
        client.handles[99] = third
        wanted = [handle for handle in (1, 2, 4) if not client.handles[handle].num_ends]
        opened = await client.resume([*wanted, 99])
        assert opened.resumed
        assert list(opened.lost_handles) == [99]
    await client.ended([1, 2, 4])
    assert first.ids == expected_output(PROMPT, 60)
    assert first.logprob_positions == list(range(3 + 60))
    assert second.ids == expected_output(PROMPT, 60)[4:]
    assert fourth.ids == expected_output(PROMPT, 2)
    # Not listed, so given up.
    await until(lambda: bench.worker.replica.load.num_running == 0)
    await client.break_off()
    await until_idle(bench)


async def test_ids_that_were_sent_but_lost_come_again_after_a_resume(bench: Bench) -> None:
    client = bench.client()
    await client.open(read=False)
    (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=500))
    await until(lambda: bench.worker.replica.load.num_output_tokens == 500)
    await client.break_off()
    assert not received.ids
    assert (await client.resume([1])).resumed
    await client.ended()
    assert received.ids == expected_output(PROMPT, 500)
    assert received.admissions == 1


async def test_a_session_nobody_resumes_is_freed(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=4000))
    await until(lambda: bool(received.ids))
    await client.break_off()
    assert (await bench.info()).load.num_sessions == 1
    await until_idle(bench)
    opened = await client.resume([1])
    assert not opened.resumed
    assert list(opened.lost_handles) == [1]


async def test_a_second_call_takes_the_session_over(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=60))
    await until(lambda: bool(received.ids))
    again = bench.client()
    again.handles = client.handles
    assert (await again.resume([1])).resumed
    assert await client.call.code() is grpc.StatusCode.ABORTED
    await again.ended()
    assert received.ids == expected_output(PROMPT, 60)


async def test_ids_missing_when_the_call_broke_end_their_handle_retryably(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    submit = make_submit(1, [1, 2, 3, 4])
    del submit.token_ids[2:]
    (received,) = await client.submit(submit)
    await until(lambda: bench.worker.sessions.num_handles == 1)
    await client.break_off()
    assert (await client.resume([1])).resumed
    await client.ended()
    assert received.error is not None
    assert received.error.code == grpc.StatusCode.ABORTED.value[0]


async def test_a_half_closed_session_ends_well_with_its_last_handle(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=30))
    await client.call.done_writing()
    assert await client.call.code() is grpc.StatusCode.OK
    assert received.ids == expected_output(PROMPT, 30)
    await until_idle(bench)


async def test_heartbeats_tell_a_hung_engine_from_an_idle_one(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    await until(lambda: len(client.heartbeats) > 2)
    assert not client.heartbeats[-1].engine_busy
    bench.engine.step_s = 0.002
    (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=4000))
    await until(lambda: len(received.ids) > 3)
    bench.engine.pause()
    client.heartbeats.clear()
    await until(lambda: len(client.heartbeats) > 6)
    settled = client.heartbeats[-3:]
    assert len({beat.engine_step_number for beat in settled}) == 1
    assert all(beat.engine_busy and beat.predicted_step_ns for beat in settled)
    bench.engine.resume()
    step_number = settled[-1].engine_step_number
    await until(lambda: client.heartbeats[-1].engine_step_number > step_number)


async def test_a_stopped_reader_is_closed_and_others_go_on() -> None:
    async with running_bench(context_length=1_000_000, num_pages=100_000) as bench:
        bench.engine.step_s = 0.002
        stuck, other = bench.client("stuck"), bench.client("other")
        await stuck.open(read=False)
        await other.open()
        # Some 10 MB of log-probabilities each, then ids for as long as nobody stops them.
        options = logprobs_pb2.LogprobOptions(num_top=64, prompt_start=0)
        prompt = [1] * 20_000
        for handle in range(2):
            await stuck.submit(
                make_submit(handle, prompt, max_new_tokens=900_000, logprobs=options)
            )
        (session,) = [s for s in bench.worker.sessions if s.name[1] == "stuck"]
        call = session.call
        assert call is not None
        await until(lambda: call.write_began is not None and session.has_unsent)
        (received,) = await other.submit(make_submit(1, PROMPT, max_new_tokens=150))
        # The reader's own status stays unread; the worker frees the session all the same.
        await until(lambda: session.call is None)
        await other.ended()
        assert received.ids == expected_output(PROMPT, 150)
        await until(lambda: bench.worker.replica.load.num_running == 0)
        assert (await bench.info()).load.num_sessions == 1
        with pytest.raises(aio.AioRpcError):
            await _read_to_end(stuck.call)
        assert await stuck.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_late_reader_gets_everything() -> None:
    async with running_bench(tokens_per_step=200, context_length=400_000) as bench:
        client = bench.client()
        await client.open(read=False)
        received = await client.submit(
            *(make_submit(handle, PROMPT, max_new_tokens=50_000) for handle in range(4))
        )
        await until(lambda: bench.worker.replica.load.num_output_tokens == 200_000)
        while not all(entry.num_ends for entry in received):
            response = await client.call.read()
            assert response.ByteSize() < MAX_FRAME_BYTES
            if response.WhichOneof("message") == "frame":
                client.take(response.frame)
        assert all(entry.ids == expected_output(PROMPT, 50_000) for entry in received)


async def test_long_prompt_logprobs_do_not_hold_others_up() -> None:
    async with running_bench(context_length=140_000, num_pages=20_000) as bench:
        bench.engine.step_s = 0.002
        client = bench.client()
        await client.open()
        prompt = [1] * 128_000
        options = logprobs_pb2.LogprobOptions(output=True, num_top=5, prompt_start=0)
        long = make_submit(0, prompt, max_new_tokens=4, logprobs=options)
        del long.token_ids[:]
        chats = [make_submit(handle, PROMPT, max_new_tokens=20) for handle in range(1, 64)]
        await client.submit(long, *chats)
        for start in range(0, len(prompt), 40_000):
            ids = prompt[start : start + 40_000]
            await client.send(id_fragments=[pb.IdFragment(handle=0, offset=start, token_ids=ids)])
        await client.ended(range(1, 64))
        await client.ended([0])
        received = client.handles[0]
        assert received.logprob_positions == list(range(128_004))
        assert received.ids == expected_output(prompt, 4)
        for handle in range(1, 64):
            assert client.handles[handle].ids == expected_output(PROMPT, 20)


async def test_half_of_many_streams_cancelled_leaves_nothing(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    handles = range(64)
    await client.submit(
        *(make_submit(handle, [handle, 1], max_new_tokens=60) for handle in handles)
    )
    await until(lambda: all(client.handles[handle].ids for handle in handles))
    await client.send(cancels=handles[::2])
    await client.ended()
    for handle in handles[1::2]:
        assert client.handles[handle].ids == expected_output([handle, 1], 60)
    for handle in handles[::2]:
        finish = client.handles[handle].finish
        assert finish is not None
        assert finish.reason == finish_reason_pb2.FINISH_REASON_CANCELLED
    await client.send(closes=handles)
    await client.break_off()
    await until_idle(bench)


async def test_an_engine_failure_ends_every_handle_retryably(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    entries = await client.submit(
        *(make_submit(handle, PROMPT, max_new_tokens=4000) for handle in range(3))
    )
    await until(lambda: all(entry.ids for entry in entries))
    bench.engine.fail("out of luck")
    await client.ended()
    for entry in entries:
        assert entry.error is not None
        assert entry.error.code == grpc.StatusCode.ABORTED.value[0]
        assert "out of luck" in entry.error.message
    (refused,) = await client.submit(make_submit(9, PROMPT))
    await client.ended()
    assert refused.error is not None
    assert refused.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    failure = bench.worker.replica.failed.result()
    assert not failure.permanent


async def test_pain_24_h_draining_refuses_new_work_and_finishes_the_old(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    (running,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=60))
    await until(lambda: bool(running.ids))
    bench.worker.replica.drain("asked")
    (refused,) = await client.submit(make_submit(2, PROMPT))
    await client.ended()
    assert refused.error is not None
    assert refused.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert running.ids == expected_output(PROMPT, 60)
    await until(lambda: client.heartbeats[-1].draining)


async def _read_to_end(call: Any) -> None:
    while await call.read() is not aio.EOF:
        pass
