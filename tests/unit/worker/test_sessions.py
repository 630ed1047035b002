"""Sessions without gRPC: merging, fragments under the frame limit, resume, idempotence."""

import asyncio
import random
from itertools import count
from typing import Any

import pytest
from grpc import aio

from rhizome.common.v1 import pool_identity_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import (
    InvalidRequestError,
    OverloadedError,
    RhizomeError,
    SessionBrokenError,
)
from services.common.rpc import MAX_FRAME_BYTES
from services.worker import wire
from services.worker.engine.messages import (
    Admission,
    Finish,
    LogprobRows,
    SequenceError,
    StepOutput,
)
from services.worker.outputs import NOBODY, OutputLog, OutputRouter, Sink
from services.worker.session_calls import SessionTable, SessionTimes
from services.worker.sessions import Call, Session
from tests.fakes.session_client import PROTOCOL, Received, SessionClient, make_submit

LIMITS = wire.Limits(context_length=10_000_000, vocab_size=1000, default_namespace="")


class FakeSequences:
    """The replica's place: routes steps that the test makes up."""

    def __init__(self) -> None:
        self.router = OutputRouter()
        self.cancelled: list[int] = []
        self._keys = count(1)

    def check_lengths(self, submit: pb.Submit) -> None:
        wire.check_lengths(submit, LIMITS)

    def submit(self, submit: pb.Submit, token_ids: list[int], handle: int, sink: Sink) -> OutputLog:
        request = wire.request_from_submit(
            submit, token_ids, key=next(self._keys), limits=LIMITS, now_ns=0
        )
        log = OutputLog(handle, sink, request)
        self.router.add(log)
        return log

    def cancel(self, logs: list[OutputLog]) -> None:
        self.cancelled += [log.handle for log in logs if log.end is None]

    def abandon(self, logs: list[OutputLog]) -> None:
        for log in logs:
            log.sink = NOBODY
        self.cancel(logs)


def finish(key: int, num_output_tokens: int) -> Finish:
    return Finish(key, "length", None, num_output_tokens, 0, 0, 0, 0, 0, 0)


def rows(start: int, num_rows: int, num_top: int = 0) -> LogprobRows:
    return LogprobRows(
        start_position=start,
        token_ids=[1] * num_rows,
        logprobs=[-float(start + i) for i in range(num_rows)],
        num_top=num_top,
        top_token_ids=[2] * (num_rows * num_top),
        top_logprobs=[-1.0] * (num_rows * num_top),
    )


class Bench:
    """One session with an attached call that is written only when the test asks."""

    def __init__(self) -> None:
        self.sequences = FakeSequences()
        self.session = Session(("g", "s"), self.sequences, pb.Heartbeat)
        self.call = self.attach()
        self.steps = count(1)
        # Only its bookkeeping is used: what a strict gateway makes of the frames.
        self.client = SessionClient(aio.insecure_channel("unix:/nowhere"))

    def attach(self) -> Call:
        call = Call(pb.SessionOpened())
        self.session.attach(call)
        self.session.next_message(call)
        return call

    def submit(self, *submits: pb.Submit) -> list[Received]:
        for submit in submits:
            first_offset = submit.num_token_ids - submit.prompt_len
            self.client.handles[submit.handle] = Received(first_offset=first_offset)
        self.session.handle(pb.ConnectRequest(submits=submits))
        return [self.client.handles[submit.handle] for submit in submits]

    def step(self, ids: dict[int, list[int]], **fields: Any) -> None:
        output = StepOutput(
            step_number=next(self.steps),
            keys=list(ids),
            num_tokens=[len(new) for new in ids.values()],
            token_ids=[token_id for new in ids.values() for token_id in new],
            **fields,
        )
        self.sequences.router.route(output)

    def read(self) -> pb.StepFrame | None:
        """Write one message and let the client take it."""
        message = self.session.next_message(self.call)
        if message is None:
            return None
        assert message.ByteSize() < MAX_FRAME_BYTES
        self.client.take(message.frame)
        return message.frame

    def read_all(self) -> list[pb.StepFrame]:
        frames = []
        while (frame := self.read()) is not None:
            frames.append(frame)
        return frames


@pytest.fixture
async def bench() -> Bench:
    return Bench()


def test_a_step_for_a_fast_reader_is_one_frame(bench: Bench) -> None:
    bench.submit(make_submit(10, [1]), make_submit(11, [1]))
    bench.step({1: [5], 2: [6]}, admissions=[Admission(1, 4, 9), Admission(2, 0, 9)])
    bench.step({}, finishes=[finish(1, 1)])
    (frame,) = [bench.read()]
    assert frame is not None
    assert list(frame.handles) == [10, 11]
    assert list(frame.token_ids) == [5, 6]
    assert [admission.cached_tokens for admission in frame.admissions] == [4, 0]
    frame = bench.read()
    assert frame is not None
    assert frame.step_number == 2
    assert [entry.handle for entry in frame.finishes] == [10]
    assert bench.read() is None


def test_steps_merge_by_handle_while_the_reader_is_slow(bench: Bench) -> None:
    first, second = bench.submit(make_submit(10, [1]), make_submit(11, [1]))
    for token in range(100):
        bench.step({1: [token], 2: [token, token]})
    frames = bench.read_all()
    # The first step's frame was ready; everything else merged into one.
    assert len(frames) == 2
    assert list(frames[1].handles) == [10, 11]
    assert list(frames[1].num_tokens) == [99, 198]
    assert frames[1].step_number == 100
    assert first.ids == list(range(100))
    assert len(second.ids) == 200


def test_what_does_not_fit_one_frame_is_spread_over_several(bench: Bench) -> None:
    (received,) = bench.submit(make_submit(10, [1]))
    bench.step({1: [7] * 400_000}, finishes=[finish(1, 400_000)])
    frames = bench.read_all()
    assert len(frames) > 4
    assert received.ids == [7] * 400_000
    assert received.num_ends == 1


def test_long_logprobs_take_turns_with_everything_else(bench: Bench) -> None:
    long, chat = bench.submit(make_submit(10, [1] * 50_000), make_submit(11, [1]))
    bench.step({}, logprobs=[(1, rows(0, 50_000, num_top=10))])
    bench.step({1: [3], 2: [4]}, logprobs=[(1, rows(50_000, 1, num_top=10))])
    frames = bench.read_all()
    assert len(frames) > 10
    assert list(frames[0].handles) == [11]
    assert chat.ids == [4]
    assert long.logprob_positions == list(range(50_001))
    assert long.ids == [3]


def test_an_id_never_leaves_before_its_logprobs(bench: Bench) -> None:
    bench.submit(make_submit(10, [1] * 30_000))
    bench.step({1: [3]}, logprobs=[(1, rows(0, 30_001, num_top=5))])
    frames = bench.read_all()
    assert [bool(frame.handles) for frame in frames] == [False] * (len(frames) - 1) + [True]


def test_a_resume_sends_again_from_the_offsets(bench: Bench) -> None:
    first, second = bench.submit(
        make_submit(10, [1, 1]), make_submit(11, [1, 1], output=[8, 8], max_new_tokens=9)
    )
    bench.step({1: [1], 2: [3]}, admissions=[Admission(1, 0, 0), Admission(2, 0, 0)])
    bench.read_all()
    # Written, but lost on the way.
    for token in (2, 3):
        bench.step({1: [token], 2: [token]}, logprobs=[(1, rows(token + 1, 1))])
        bench.session.next_message(bench.call)
    bench.session.detach(bench.call)
    bench.step({1: [4]}, finishes=[finish(1, 4)])
    lost = bench.session.resume([10, 11, 12], [first.next_offset, second.next_offset, 0])
    assert lost == [12]
    bench.call = bench.attach()
    bench.read_all()
    assert first.ids == [1, 2, 3, 4]
    assert first.logprob_positions == [3, 4]
    assert first.num_ends == 1
    assert second.ids == [3, 2, 3]
    assert (first.admissions, second.admissions) == (1, 1)
    bench.session.detach(bench.call)
    assert bench.session.resume([10], [3]) == []
    frame = bench.session.next_message(bench.attach())
    assert frame is not None
    assert not frame.frame.logprobs
    assert list(frame.frame.token_ids) == [4]


def test_a_resume_with_offsets_we_never_sent_loses_the_handle(bench: Bench) -> None:
    bench.submit(make_submit(10, [1], output=[5], max_new_tokens=9))
    bench.step({1: [1]})
    bench.session.detach(bench.call)
    assert bench.session.resume([10], [0]) == [10]
    assert bench.sequences.cancelled == [10]


def test_handles_a_resume_does_not_list_are_given_up(bench: Bench) -> None:
    bench.submit(make_submit(10, [1]), make_submit(11, [1]))
    bench.session.detach(bench.call)
    assert bench.session.resume([11], [0]) == []
    assert bench.sequences.cancelled == [10]
    assert len(bench.session) == 1
    bench.call = bench.attach()
    bench.step({1: [5], 2: [6]})
    frames = bench.read_all()
    assert [list(frame.handles) for frame in frames] == [[11]]


def test_an_end_comes_again_until_it_is_closed(bench: Bench) -> None:
    bench.submit(make_submit(10, [1]))
    bench.step({1: [5]}, finishes=[finish(1, 1)])
    bench.read_all()
    for _ in range(2):
        bench.session.detach(bench.call)
        assert bench.session.resume([10], [1]) == []
        bench.call = bench.attach()
        bench.client.handles[10].num_ends = 0
        bench.read_all()
        assert bench.client.handles[10].num_ends == 1
    bench.session.handle(pb.ConnectRequest(closes=[10]))
    bench.session.detach(bench.call)
    assert bench.session.resume([10], [1]) == [10]


def test_closing_a_live_handle_stops_it(bench: Bench) -> None:
    bench.submit(make_submit(10, [1]))
    bench.session.handle(pb.ConnectRequest(closes=[10, 10, 99]))
    assert bench.sequences.cancelled == [10]
    bench.step({1: [5]}, finishes=[finish(1, 1)])
    assert bench.read() is None
    assert not len(bench.sequences.router)


def test_cancelling_what_has_not_all_arrived_ends_it_once(bench: Bench) -> None:
    submit = make_submit(10, [1, 2, 3])
    del submit.token_ids[1:]
    (received,) = bench.submit(submit)
    bench.session.handle(pb.ConnectRequest(cancels=[10, 10]))
    late = pb.IdFragment(handle=10, offset=1, token_ids=[2, 3])
    bench.session.handle(pb.ConnectRequest(id_fragments=[late], cancels=[10]))
    bench.read_all()
    assert received.finish is not None
    assert received.num_ends == 1
    assert not len(bench.sequences.router)


def test_cancelling_a_resumed_submit_that_has_not_all_arrived_counts_its_output(
    bench: Bench,
) -> None:
    submit = make_submit(10, [1, 2, 3], output=[4, 5])
    del submit.token_ids[1:]
    (received,) = bench.submit(submit)
    bench.session.handle(pb.ConnectRequest(cancels=[10]))
    bench.read_all()
    assert received.finish is not None
    assert received.finish.num_output_tokens == 2


def test_ids_before_their_submit_break_the_session(bench: Bench) -> None:
    with pytest.raises(SessionBrokenError):
        bench.session.handle(
            pb.ConnectRequest(id_fragments=[pb.IdFragment(handle=3, token_ids=[1])])
        )


def test_a_gap_in_ids_breaks_the_session(bench: Bench) -> None:
    submit = make_submit(10, [1, 2, 3])
    del submit.token_ids[1:]
    bench.submit(submit)
    fragment = pb.IdFragment(handle=10, offset=2, token_ids=[3])
    with pytest.raises(SessionBrokenError):
        bench.session.handle(pb.ConnectRequest(id_fragments=[fragment]))


def test_a_long_error_message_is_cut(bench: Bench) -> None:
    (received,) = bench.submit(make_submit(10, [1]))
    bench.step({}, errors=[SequenceError(1, 13, "x" * 500_000, 0)])
    bench.read_all()
    assert received.error is not None
    assert 0 < len(received.error.message) < 4096


def test_random_histories_give_every_handle_all_of_its_output(bench: Bench) -> None:
    draw = random.Random(5)
    said: dict[int, list[int]] = {}
    live: dict[int, int] = {}
    for handle in range(150):
        bench.submit(make_submit(handle, [1, 1]))
        live[handle + 1] = handle
        said[handle] = []
        for _ in range(draw.randint(0, 4)):
            new = {
                key: [draw.randint(0, 999) for _ in range(draw.choice([1, 1, 1, 2, 8000]))]
                for key in draw.sample(sorted(live), draw.randint(0, len(live)))
                if len(said[live[key]]) < 20_000
            }
            logprobs = [
                (key, rows(2 + len(said[live[key]]), len(ids), num_top=2))
                for key, ids in new.items()
                if live[key] % 5 == 0
            ]
            for key, ids in new.items():
                said[live[key]] += ids
            ends = [key for key in new if draw.random() < 0.1]
            finishes = [finish(key, len(said[live[key]])) for key in ends]
            bench.step(new, logprobs=logprobs, finishes=finishes)
            for key in ends:
                del live[key]
        for _ in range(draw.randint(0, 2)):
            bench.read()
        if draw.random() < 0.1:
            for _ in range(draw.randint(0, 2)):
                bench.session.next_message(bench.call)
            bench.session.detach(bench.call)
            wanted = [h for h, entry in bench.client.handles.items() if not entry.num_ends]
            offsets = [bench.client.handles[h].next_offset for h in wanted]
            assert bench.session.resume(wanted, offsets) == []
            bench.call = bench.attach()
    bench.read_all()
    for handle, ids in said.items():
        received = bench.client.handles[handle]
        assert received.ids == ids
        assert received.num_ends == (handle not in live.values())
        if handle % 5 == 0:
            assert received.logprob_positions == list(range(2, 2 + len(ids)))


class FakeContext:
    """A call whose writes wait for `reading`."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self.messages: list[pb.ConnectResponse] = []

    async def read(self) -> Any:
        return await self.requests.get()

    async def write(self, message: pb.ConnectResponse) -> None:
        await self.reading.wait()
        self.messages.append(message)


def opening(**fields: Any) -> pb.ConnectRequest:
    fields = {"gateway_id": "g", "session_id": "s", "protocol": PROTOCOL, **fields}
    return pb.ConnectRequest(open=pb.OpenSession(**fields))


def make_table(sequences: FakeSequences, **times: float) -> SessionTable:
    return SessionTable(sequences, pb.Heartbeat, epoch=3, times=SessionTimes(**times))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_a_blocked_write_closes_the_session_and_frees_its_sequences() -> None:
    sequences = FakeSequences()
    table = make_table(sequences, heartbeat_s=0.01, no_progress_s=0.05, hold_s=60)
    ticks = asyncio.create_task(table.tick())
    context = FakeContext()
    context.requests.put_nowait(opening())
    call = asyncio.create_task(table.serve(context))
    context.requests.put_nowait(pb.ConnectRequest(submits=[make_submit(1, [1])]))
    await until(lambda: len(sequences.router) == 1)
    context.reading.clear()
    for number in range(1000):
        sequences.router.route(
            StepOutput(step_number=number, keys=[1], num_tokens=[1], token_ids=[1])
        )
    with pytest.raises(OverloadedError):
        await call
    assert len(table) == 0
    assert sequences.cancelled == [1]
    ticks.cancel()


async def test_a_slow_reader_that_makes_progress_stays() -> None:
    sequences = FakeSequences()
    table = make_table(sequences, heartbeat_s=0.01, no_progress_s=60)
    ticks = asyncio.create_task(table.tick())
    context = FakeContext()
    context.requests.put_nowait(opening())
    call = asyncio.create_task(table.serve(context))
    context.requests.put_nowait(pb.ConnectRequest(submits=[make_submit(1, [1])]))
    await until(lambda: len(sequences.router) == 1)
    context.reading.clear()
    for number in range(1000):
        sequences.router.route(
            StepOutput(step_number=number, keys=[1], num_tokens=[1], token_ids=[1])
        )
        await asyncio.sleep(0)
    context.reading.set()
    await until(lambda: sum(len(m.frame.token_ids) for m in context.messages) == 1000)
    assert sum(m.HasField("frame") for m in context.messages) <= 3
    assert not call.done()
    call.cancel()
    ticks.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert len(table) == 1


async def test_a_second_opening_fails_the_session() -> None:
    table = make_table(FakeSequences())
    context = FakeContext()
    for _ in range(2):
        context.requests.put_nowait(opening())
    with pytest.raises(InvalidRequestError):
        await table.serve(context)
    assert len(table) == 0


@pytest.mark.parametrize(
    "request_",
    [
        opening(epoch=4),
        opening(session_id=""),
        opening(protocol=pool_identity_pb2.ProtocolRange(min_revision=5, max_revision=6)),
        opening(resume=True, resume_handles=[1]),
        pb.ConnectRequest(),
        aio.EOF,
    ],
)
async def test_a_wrong_opening_leaves_no_session(request_: Any) -> None:
    table = make_table(FakeSequences())
    context = FakeContext()
    context.requests.put_nowait(request_)
    with pytest.raises(RhizomeError):
        await table.serve(context)
    assert len(table) == 0


async def test_a_fresh_opening_under_an_old_name_starts_afresh() -> None:
    sequences = FakeSequences()
    table = make_table(sequences, hold_s=60)
    contexts = [FakeContext(), FakeContext()]
    calls = []
    for context in contexts:
        context.requests.put_nowait(opening())
        context.requests.put_nowait(pb.ConnectRequest(submits=[make_submit(1, [1])]))
        calls.append(asyncio.create_task(table.serve(context)))
        await until(lambda: len(sequences.router) == len(calls))
    with pytest.raises(SessionBrokenError):
        await calls[0]
    assert sequences.cancelled == [1]
    assert (len(table), table.num_handles) == (1, 1)
    calls[1].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
