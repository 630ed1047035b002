"""The mock worker keeps the wire's rules, so what passes against it passes against a worker."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import sys
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc import aio

from rhizome.common.v1 import finish_reason_pb2, logprobs_pb2
from rhizome.scheduler.v1 import scheduler_service_pb2 as scheduler_pb
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from rhizome.worker.v1 import worker_service_pb2 as pb
from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from services.common.prefix_hash import ROOT_HASH, prefix_hashes
from services.common.rpc import open_channel
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from tests.fakes.mock_worker import MockWorker, MockWorkerConfig, running_mock_worker
from tests.fakes.session_client import Received, SessionClient, make_submit

FAST = MockWorkerConfig(step_ms=1, vocab_size=1000)
PROMPT = list(range(10, 60))


@dataclasses.dataclass
class Bench:
    """A mock worker and a gateway's session with it."""

    worker: MockWorker
    channel: aio.Channel
    client: SessionClient

    @property
    def stub(self) -> WorkerServiceStub:
        return WorkerServiceStub(self.channel)

    def expected(self, prompt: list[int], count: int, choice: int = 0) -> list[int]:
        cycle = self.worker.cycle
        return cycle.output(cycle.phase(prompt, choice), 0, count)


@contextlib.asynccontextmanager
async def bench(**changes: object) -> AsyncIterator[Bench]:
    async with running_mock_worker(dataclasses.replace(FAST, **changes)) as worker:
        async with open_channel(worker.address) as channel:
            yield Bench(worker, channel, SessionClient(channel))


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def drain(call: aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]) -> None:
    while await call.read() is not aio.EOF:
        pass


async def test_every_handle_gets_its_own_tokens_one_admission_and_one_end() -> None:
    async with bench() as b:
        opened = await b.client.open(epoch=b.worker.epoch)
        assert opened.epoch == b.worker.epoch
        prompts = [[*PROMPT, n] for n in range(1, 9)]
        await b.client.submit(
            *(make_submit(n, p, max_new_tokens=5 + n) for n, p in enumerate(prompts, 1))
        )
        await b.client.ended()
        for n, prompt in enumerate(prompts, 1):
            received = b.client.handles[n]
            assert received.ids == b.expected(prompt, 5 + n)
            assert received.admissions == 1
            assert received.finish is not None
            assert received.finish.reason == finish_reason_pb2.FINISH_REASON_LENGTH
        await b.client.send(closes=list(range(1, 9)))
        await until(lambda: b.worker.sessions.num_handles == 0)


async def test_all_running_handles_share_one_frame_a_step() -> None:
    async with bench(step_ms=20) as b:
        await b.client.open()
        await b.client.submit(
            *(make_submit(n, [n, *PROMPT], max_new_tokens=10) for n in range(1, 65))
        )
        await b.client.ended()
        assert b.client.num_frames <= 14


async def test_choices_of_one_prompt_differ_and_continuations_agree() -> None:
    async with bench() as b:
        await b.client.open()
        whole = b.expected(PROMPT, 12)
        await b.client.submit(
            make_submit(1, PROMPT, max_new_tokens=12),
            make_submit(2, PROMPT, max_new_tokens=12, choice_index=1),
            make_submit(3, PROMPT, max_new_tokens=12, output=whole[:7]),
        )
        await b.client.ended()
        assert b.client.handles[1].ids == whole
        assert b.client.handles[2].ids != whole
        assert b.client.handles[3].ids == whole[7:]


async def test_a_submit_repeated_and_a_cancel_repeated_change_nothing() -> None:
    async with bench() as b:
        await b.client.open()
        submit = make_submit(1, PROMPT, max_new_tokens=100_000)
        await b.client.submit(submit)
        await b.client.send(submits=[submit])
        await until(lambda: len(b.client.handles[1].ids) > 3)
        await b.client.send(cancels=[1, 1, 99])
        await b.client.ended()
        received = b.client.handles[1]
        assert received.finish is not None
        assert received.finish.reason == finish_reason_pb2.FINISH_REASON_CANCELLED
        assert b.worker.engine.num_running == 0
        await b.client.send(closes=[1], submits=[submit])
        await until(lambda: b.worker.sessions.num_handles == 0)


async def test_a_stop_id_ends_a_sequence_and_is_its_last_id() -> None:
    async with bench() as b:
        await b.client.open()
        expected = b.expected(PROMPT, 30)
        submit = make_submit(1, PROMPT, max_new_tokens=100)
        submit.sampling.stop_token_ids.append(expected[20])
        await b.client.submit(submit)
        await b.client.ended()
        received = b.client.handles[1]
        assert received.ids == expected[:21]
        assert received.finish is not None
        assert received.finish.matched_token_id == expected[20]
        assert received.finish.reason == finish_reason_pb2.FINISH_REASON_STOP


async def test_ids_may_follow_in_fragments() -> None:
    async with bench() as b:
        await b.client.open()
        submit = make_submit(1, PROMPT, max_new_tokens=4)
        del submit.token_ids[20:]
        await b.client.submit(submit)
        await b.client.send(
            id_fragments=[
                pb.IdFragment(handle=1, offset=15, token_ids=PROMPT[15:30]),
                pb.IdFragment(handle=1, offset=30, token_ids=PROMPT[30:]),
            ]
        )
        await b.client.ended()
        assert b.client.handles[1].ids == b.expected(PROMPT, 4)


async def test_a_gap_in_fragments_fails_the_session_as_aborted() -> None:
    async with bench() as b:
        await b.client.open()
        submit = make_submit(1, PROMPT)
        del submit.token_ids[20:]
        await b.client.submit(submit)
        await b.client.send(id_fragments=[pb.IdFragment(handle=1, offset=21, token_ids=[1])])
        assert await b.client.call.code() == grpc.StatusCode.ABORTED


async def test_a_bad_submit_ends_its_handle_alone() -> None:
    async with bench() as b:
        await b.client.open()
        constrained = make_submit(3, PROMPT)
        constrained.sampling.regex = "a+"
        await b.client.submit(
            make_submit(1, [5, 1000]),
            make_submit(2, PROMPT, max_new_tokens=3),
            constrained,
            make_submit(4, []),
        )
        await b.client.ended()
        for handle in (1, 3, 4):
            error = b.client.handles[handle].error
            assert error is not None
            assert error.code == 3
        assert b.client.handles[2].ids == b.expected(PROMPT, 3)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"epoch": 5}, grpc.StatusCode.FAILED_PRECONDITION),
        (
            {"protocol": {"min_revision": 90, "max_revision": 91}},
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
    ],
)
async def test_a_session_that_does_not_fit_is_refused(
    fields: dict[str, object], status: grpc.StatusCode
) -> None:
    async with bench() as b:
        with pytest.raises(aio.AioRpcError) as refusal:
            await b.client.open(**fields)
        assert refusal.value.code() == status


async def test_a_first_message_without_open_is_refused() -> None:
    async with bench() as b:
        call = b.stub.Connect()
        await call.write(pb.ConnectRequest(cancels=[1]))
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_resumed_session_goes_on_without_gap_or_repeat() -> None:
    async with bench() as b:
        await b.client.open()
        await b.client.submit(
            make_submit(1, PROMPT, max_new_tokens=60),
            make_submit(2, [1, *PROMPT], max_new_tokens=100_000),
        )
        await until(lambda: len(b.client.handles[1].ids) > 5)
        b.worker.drop_connections()
        assert await b.client.call.code() == grpc.StatusCode.UNAVAILABLE
        await until(lambda: b.worker.sessions.num_calls == 0)
        opened = await b.client.resume([1])
        assert opened.resumed
        await b.client.ended([1])
        assert b.client.handles[1].ids == b.expected(PROMPT, 60)
        # Handle 2 was not listed.
        assert b.worker.engine.num_running == 0


async def test_a_resume_goes_on_from_what_was_received_not_from_what_was_sent() -> None:
    async with bench() as b:
        await b.client.open()
        await b.client.submit(make_submit(1, PROMPT, max_new_tokens=20))
        await b.client.ended()
        await b.client.break_off()
        b.client.handles.clear()
        again = Received(first_offset=7)
        b.client.handles[1] = again
        await b.client.resume([1])
        await b.client.ended()
        assert again.ids == b.expected(PROMPT, 20)[7:]


async def test_an_end_of_sequence_id_ends_a_sequence_unless_it_is_ignored() -> None:
    async with bench(eos_token_id=(30,)) as b:
        await b.client.open()
        obeying = make_submit(1, PROMPT, max_new_tokens=1000)
        obeying.sampling.ignore_eos = False
        await b.client.submit(obeying, make_submit(2, PROMPT, max_new_tokens=1000))
        await b.client.ended()
        assert b.client.handles[1].ids[-1] == 30
        assert b.client.handles[1].ids.count(30) == 1
        assert len(b.client.handles[2].ids) == 1000


async def test_a_resume_of_an_unknown_session_or_handle_says_so() -> None:
    async with bench() as b:
        assert not (
            await b.client.open(resume=True, resume_handles=[4], resume_offsets=[0])
        ).resumed
        await b.client.break_off()
        opened = await b.client.open(resume=True, resume_handles=[4], resume_offsets=[0])
        assert opened.resumed
        assert opened.lost_handles == [4]


async def test_a_session_that_is_not_resumed_is_freed() -> None:
    async with bench(session_hold_s=0.05) as b:
        await b.client.open()
        await b.client.submit(make_submit(1, PROMPT, max_new_tokens=100_000))
        await until(lambda: b.worker.engine.num_running == 1)
        await b.client.break_off()
        await until(lambda: b.worker.engine.num_running == 0)
        await until(lambda: len(b.worker.sessions) == 0)


async def test_a_reader_without_progress_loses_its_session() -> None:
    async with bench(stall_s=0.2, step_ms=0, token_id=(999,)) as b:
        await b.client.open(read=False)
        options = logprobs_pb2.LogprobOptions(output=True, num_top=64)
        await b.client.submit(
            *(make_submit(n, PROMPT, max_new_tokens=100_000, logprobs=options) for n in range(1, 9))
        )
        await until(lambda: len(b.worker.sessions) == 0)
        assert b.worker.engine.num_running == 0
        with pytest.raises(aio.AioRpcError) as end:
            await drain(b.client.call)
        assert end.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_slow_reader_gets_steps_merged() -> None:
    async with bench(step_ms=0) as b:
        await b.client.open(read=False)
        await b.client.submit(make_submit(1, PROMPT, max_new_tokens=50_000))
        await until(lambda: b.worker.engine.num_running == 0 and b.worker.engine.step_number > 0)
        b.client._reader = asyncio.create_task(b.client._read())
        await b.client.ended()
        assert b.client.handles[1].ids == b.expected(PROMPT, 50_000)
        assert b.client.num_frames < b.worker.engine.step_number
        await b.client.break_off()


async def test_log_probabilities_are_contiguous_from_the_prompt_on() -> None:
    async with bench(context_length=100_000) as b:
        await b.client.open()
        prompt = [n % 1000 for n in range(40_000)]
        options = logprobs_pb2.LogprobOptions(output=True, num_top=2, prompt_start=0)
        submit = make_submit(1, prompt, max_new_tokens=5, logprobs=options)
        await b.client.submit(submit, make_submit(2, PROMPT, max_new_tokens=5))
        await b.client.ended()
        assert b.client.handles[1].logprob_positions == list(range(40_005))
        assert b.client.handles[2].logprob_positions == []


async def test_heartbeats_show_a_hung_engine() -> None:
    async with bench() as b:
        await b.client.open()
        await b.client.submit(make_submit(1, PROMPT, max_new_tokens=100_000))
        await until(lambda: b.worker.engine.step_number > 5)
        b.worker.engine.hang()
        start = len(b.client.heartbeats)
        await until(lambda: len(b.client.heartbeats) >= start + 4)
        later = b.client.heartbeats[start + 2 :]
        assert {beat.engine_step_number for beat in later} == {b.worker.engine.step_number}
        assert all(beat.engine_busy for beat in later)
        b.worker.engine.unhang()
        await until(lambda: b.worker.engine.step_number > later[0].engine_step_number)


async def test_every_nth_sequence_fails_alone() -> None:
    async with bench(fail_every_nth=3) as b:
        await b.client.open()
        await b.client.submit(
            *(make_submit(n, [n, *PROMPT], max_new_tokens=8) for n in range(1, 7))
        )
        await b.client.ended()
        failed = [handle for handle, entry in b.client.handles.items() if entry.error is not None]
        assert failed == [3, 6]
        assert len(b.client.handles[3].ids) == 4


async def test_a_sequence_past_its_time_ends_with_deadline_exceeded() -> None:
    async with bench() as b:
        await b.client.open()
        submit = make_submit(1, PROMPT, max_new_tokens=100_000)
        submit.remaining.FromMilliseconds(30)
        await b.client.submit(submit)
        await b.client.ended()
        error = b.client.handles[1].error
        assert error is not None
        assert error.code == 4


async def test_death_after_n_tokens_breaks_the_session_and_closes_the_port() -> None:
    async with bench(die_after_tokens=20) as b:
        await b.client.open()
        await b.client.submit(make_submit(1, PROMPT, max_new_tokens=100_000))
        assert await b.client.call.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
        )
        with pytest.raises(aio.AioRpcError):
            await b.stub.GetWorkerInfo(pb.GetWorkerInfoRequest())


async def test_generate_streams_one_sequence_and_its_cancellation_frees_it() -> None:
    async with bench() as b:
        submit = make_submit(0, PROMPT, max_new_tokens=9)
        responses = [r async for r in b.stub.Generate(pb.GenerateRequest(submit=submit))]
        assert [t for r in responses for t in r.token_ids] == b.expected(PROMPT, 9)
        assert responses[0].HasField("admission")
        assert responses[-1].finish.num_output_tokens == 9
        endless = make_submit(0, PROMPT, max_new_tokens=100_000)
        call = b.stub.Generate(pb.GenerateRequest(submit=endless))
        await call.read()
        call.cancel()
        await until(lambda: b.worker.engine.num_running == 0)
        with pytest.raises(aio.AioRpcError) as refusal:
            await b.stub.Generate(pb.GenerateRequest(submit=make_submit(0, [5000]))).read()
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_shared_prefix_is_cached_and_announced_once() -> None:
    async with bench(page_size=16) as b:
        await b.client.open()
        longer = [*PROMPT[:48], *range(500, 540)]
        first, second = prefix_hashes(PROMPT, 16, "ns"), prefix_hashes(longer, 16, "ns")
        await b.client.submit(make_submit(1, PROMPT, namespace="ns"))
        await b.client.submit(make_submit(2, longer, namespace="ns"))
        await b.client.ended()
        assert b.client.handles[1].finish is not None
        assert b.client.handles[2].finish is not None
        assert b.client.handles[1].finish.cached_tokens == 0
        assert b.client.handles[2].finish.cached_tokens == 48
        watch = b.stub.WatchCacheEvents(
            pb.WatchCacheEventsRequest(after_sequence_number=0, epoch=b.worker.epoch)
        )
        events = [event async for event in _events(watch, 2)]
        assert [list(e.stored.prefix_hashes) for e in events] == [first, second[3:]]
        assert [e.stored.parent_hash for e in events] == [ROOT_HASH, first[-1]]


async def test_a_full_cache_evicts_children_first_and_a_flush_clears_it() -> None:
    async with bench(page_size=16, num_pages=8) as b:
        await b.client.open()
        prompts = [[n] * 80 for n in range(1, 5)]
        await b.client.submit(*(make_submit(n, p) for n, p in enumerate(prompts, 1)))
        await b.client.ended()
        held: dict[int, int] = {}
        watch = b.stub.WatchCacheEvents(
            pb.WatchCacheEventsRequest(after_sequence_number=0, epoch=b.worker.epoch)
        )
        async for event in _events(watch, b.worker.cache.sequence_number):
            parent = event.stored.parent_hash
            for page in event.stored.prefix_hashes:
                assert parent == ROOT_HASH or parent in held
                held[page] = parent
                parent = page
            for page in event.removed.prefix_hashes:
                del held[page]
                assert page not in held.values()
        assert len(held) == 8
        freed = await b.stub.FlushCache(pb.FlushCacheRequest())
        assert freed.num_freed_pages == 8


async def test_watching_from_a_place_no_longer_held_is_out_of_range() -> None:
    async with bench() as b:
        for epoch, number, status in (
            (b.worker.epoch, 7, grpc.StatusCode.OUT_OF_RANGE),
            (1, 0, grpc.StatusCode.FAILED_PRECONDITION),
        ):
            request = pb.WatchCacheEventsRequest(after_sequence_number=number, epoch=epoch)
            with pytest.raises(aio.AioRpcError) as refusal:
                await b.stub.WatchCacheEvents(request).read()
            assert refusal.value.code() == status


async def test_rpcs_of_later_releases_are_unimplemented() -> None:
    async with bench() as b:
        for rpc, request in (
            (b.stub.Embed, pb.EmbedRequest()),
            (b.stub.StartProfile, pb.StartProfileRequest()),
            (b.stub.StopProfile, pb.StopProfileRequest()),
        ):
            with pytest.raises(aio.AioRpcError) as refusal:
                await rpc(request)
            assert refusal.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_it_registers_with_the_real_scheduler_and_reports_its_reservations() -> None:
    async with running_scheduler(SchedulerConfig(listen="localhost:0"), grace_s=0) as scheduler:
        address = f"localhost:{scheduler.server.port}"
        async with bench(scheduler=(address,)) as b, open_channel(address) as channel:
            stub = SchedulerServiceStub(channel)
            async with asyncio.timeout(20):
                await b.worker.registrations[0].accepted.wait()
            schedule = scheduler_pb.ScheduleRequest(
                request_id="r1", model="mock", num_prompt_tokens=50, max_new_tokens=5, num_choices=1
            )
            placed = [event async for event in stub.Schedule(schedule)][-1].placed
            assert (placed.worker_id, placed.address) == ("mock-0", b.worker.address)
            reports: list[tuple[int, bool]] = []
            b.worker.engine.on_reservation.append(lambda *note: reports.append(note))
            await b.client.open(epoch=placed.epoch)
            await b.client.submit(
                *(
                    make_submit(n, PROMPT, choice_index=n, reservation_id=placed.reservation_id)
                    for n in (1, 2)
                )
            )
            await b.client.ended()
            assert reports == [(placed.reservation_id, True), (placed.reservation_id, False)]
            await stub.DrainWorker(scheduler_pb.DrainWorkerRequest(worker_id="mock-0"))
            await until(lambda: b.worker.draining)


async def test_it_runs_as_a_process_and_stops_on_sigterm(tmp_path: object) -> None:
    address = f"unix:{tmp_path}/mock.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.mock_worker"),
        *("--listen", address, "--step-ms", "1", "--token-id", "7", "--token-id", "8"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with open_channel(address) as channel:
            async with asyncio.timeout(30):
                await channel.channel_ready()
            submit = make_submit(0, [1, 2, 3], max_new_tokens=4)
            call = WorkerServiceStub(channel).Generate(pb.GenerateRequest(submit=submit))
            ids = [token async for response in call for token in response.token_ids]
            assert sorted(ids) == [7, 7, 8, 8]
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _events(
    watch: aio.UnaryStreamCall[pb.WatchCacheEventsRequest, pb.WatchCacheEventsResponse], count: int
) -> AsyncIterator[pb.CacheEvent]:
    """The first `count` events of a watch."""
    async for response in watch:
        for event in response.events.events:
            yield event
            count -= 1
        if count <= 0:
            watch.cancel()
            return
