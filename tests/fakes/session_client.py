"""The gateway's end of a Connect call, as strict as the wire's rules allow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from rhizome.common.v1 import logprobs_pb2, pool_identity_pb2, sampling_params_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from services.common.rpc import MAX_FRAME_BYTES

PROTOCOL = pool_identity_pb2.ProtocolRange(min_revision=1, max_revision=1)


def make_submit(
    handle: int,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 8,
    output: Sequence[int] = (),
    logprobs: logprobs_pb2.LogprobOptions | None = None,
    **fields: Any,
) -> pb.Submit:
    """A greedy submit with all of its ids."""
    ids = [*prompt, *output]
    return pb.Submit(
        handle=handle,
        request_id=f"request-{handle}",
        prompt_len=len(prompt),
        num_token_ids=len(ids),
        token_ids=ids,
        sampling=sampling_params_pb2.SamplingParams(
            temperature=0, max_new_tokens=max_new_tokens, ignore_eos=True, seed=handle
        ),
        logprobs=logprobs,
        **fields,
    )


@dataclass
class Received:
    """What came for one handle. `first_offset` is the number of output ids submitted."""

    first_offset: int = 0
    ids: list[int] = field(default_factory=list)
    logprob_positions: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    admissions: int = 0
    finish: pb.SequenceFinish | None = None
    error: pb.HandleError | None = None
    num_ends: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def next_offset(self) -> int:
        return self.first_offset + len(self.ids)


class SessionClient:
    """One session over any number of calls. Fails on a gap, on a second end, on a large frame."""

    def __init__(self, channel: aio.Channel, session_id: str = "session") -> None:
        self._stub = pb_grpc.WorkerServiceStub(channel)
        self._session_id = session_id
        self.handles: dict[int, Received] = {}
        self.heartbeats: list[pb.Heartbeat] = []
        self.num_frames = 0
        self.call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def open(self, *, read: bool = True, **fields: Any) -> pb.SessionOpened:
        """Open or resume the session and start reading."""
        fields.setdefault("protocol", PROTOCOL)
        opening = pb.OpenSession(gateway_id="gateway", session_id=self._session_id, **fields)
        self.call = self._stub.Connect()
        await self.call.write(pb.ConnectRequest(open=opening))
        first = await self.call.read()
        if first is aio.EOF:
            raise AssertionError(f"{await self.call.code()}: {await self.call.details()}")
        assert first.WhichOneof("message") == "opened"
        if read:
            self._reader = asyncio.create_task(self._read())
        return first.opened

    async def resume(self, handles: Sequence[int]) -> pb.SessionOpened:
        """Open a further call where the last one broke."""
        return await self.open(
            resume=True,
            resume_handles=handles,
            resume_offsets=[self.handles[handle].next_offset for handle in handles],
        )

    async def submit(self, *submits: pb.Submit) -> list[Received]:
        """Send submits, all in one message."""
        received = []
        for submit in submits:
            entry = Received(first_offset=submit.num_token_ids - submit.prompt_len)
            self.handles[submit.handle] = entry
            received.append(entry)
        await self.call.write(pb.ConnectRequest(submits=submits))
        return received

    async def send(self, **fields: Any) -> None:
        """Send cancels, closes or fragments."""
        await self.call.write(pb.ConnectRequest(**fields))

    async def break_off(self) -> None:
        """Lose the call, as a broken connection would."""
        self.call.cancel()
        if self._reader is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None

    async def ended(self, handles: Sequence[int] | None = None) -> None:
        """Wait until these handles, or all, have their end."""
        waited = self.handles.values() if handles is None else [self.handles[h] for h in handles]
        async with asyncio.timeout(30):
            await asyncio.gather(*(entry.ended.wait() for entry in list(waited)))

    async def _read(self) -> None:
        with contextlib.suppress(aio.AioRpcError):
            while (response := await self.call.read()) is not aio.EOF:
                assert response.ByteSize() < MAX_FRAME_BYTES
                if response.WhichOneof("message") == "heartbeat":
                    self.heartbeats.append(response.heartbeat)
                elif response.WhichOneof("message") == "frame":
                    self.take(response.frame)

    def take(self, frame: pb.StepFrame) -> None:
        """Take a frame as a gateway does: duplicates dropped, gaps fatal."""
        self.num_frames += 1
        for admission in frame.admissions:
            self.handles[admission.handle].admissions += 1
        for entry in frame.logprobs:
            self._take_logprobs(self.handles[entry.handle], entry.block)
        position = 0
        for handle, offset, count in zip(
            frame.handles, frame.token_offsets, frame.num_tokens, strict=True
        ):
            received = self.handles[handle]
            ids = frame.token_ids[position : position + count]
            position += count
            assert offset <= received.next_offset, f"gap: {offset} after {received.next_offset}"
            received.ids.extend(ids[received.next_offset - offset :])
        for end in [*frame.finishes, *frame.errors]:
            received = self.handles[end.handle]
            received.num_ends += 1
            assert received.num_ends == 1, f"handle {end.handle} ended twice"
            if isinstance(end, pb.SequenceFinish):
                received.finish = end
                assert end.num_output_tokens == received.next_offset
            else:
                received.error = end
            received.ended.set()

    def _take_logprobs(self, received: Received, block: logprobs_pb2.LogprobBlock) -> None:
        positions = received.logprob_positions
        for index, logprob in enumerate(block.logprobs):
            position = block.start_position + index
            if positions and position <= positions[-1]:
                continue
            assert not positions or position == positions[-1] + 1, "gap in log-probabilities"
            positions.append(position)
            received.logprobs.append(logprob)
