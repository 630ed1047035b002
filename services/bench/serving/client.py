"""Sends one request, reads its stream of server-sent events and takes the times."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from services.bench.serving.protocol import Api, StreamEvent, StreamFailedError
from services.bench.workloads import Turn

_MAX_ERROR_CHARS = 200


@dataclass(slots=True)
class RequestRecord:
    """One request's times, in seconds of CLOCK_MONOTONIC, which processes of one host share."""

    start_s: float
    num_input_tokens: int
    num_requested_tokens: int
    # When each event that follows a token came.
    event_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None
    # Why it failed; None where it succeeded.
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return self.event_s[0] - self.start_s

    @property
    def e2e_s(self) -> float:
        """From sending to the last token."""
        return self.event_s[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None of a single one."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between neighbouring events."""
        pairs = zip(self.event_s, self.event_s[1:], strict=False)
        return [later - earlier for earlier, later in pairs]


async def send(
    session: aiohttp.ClientSession, base_url: str, api: Api, turn: Turn
) -> RequestRecord:
    """Send `turn` and read its stream to the end; a failure is told in the record.

    A stream that ends without `[DONE]`, or without a token, has failed however it ends.
    """
    # Writing the body down is part of the time to the first token, for every server alike.
    record = RequestRecord(time.monotonic(), len(turn.token_ids), turn.output_len)
    body = json.dumps(api.body(turn)).encode()
    try:
        async with session.post(base_url + api.path, data=body) as response:
            if response.status == 200:
                await _read_stream(response, api, record)
            else:
                text = (await response.text())[:_MAX_ERROR_CHARS]
                record.error = f"HTTP {response.status} {text}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        record.error = f"{type(error).__name__} {error}"[:_MAX_ERROR_CHARS]
    except StreamFailedError as error:
        record.error = f"error in the stream: {error}"[:_MAX_ERROR_CHARS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # What the server sent is not what its API promises.
        record.error = f"malformed event: {type(error).__name__} {error}"[:_MAX_ERROR_CHARS]
    record.end_s = time.monotonic()
    return record


async def _read_stream(response: aiohttp.ClientResponse, api: Api, record: RequestRecord) -> None:
    last = StreamEvent()
    is_done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            is_done = True
            break
        now_s = time.monotonic()
        event = api.read(json.loads(data))
        if event.has_tokens:
            record.event_s.append(now_s)
        if event.num_output_tokens is not None:
            last = event
    # Without counts from the server, an event is taken for a token.
    record.num_output_tokens = (
        len(record.event_s) if last.num_output_tokens is None else last.num_output_tokens
    )
    if last.num_prompt_tokens is not None:
        record.num_input_tokens = last.num_prompt_tokens
    record.num_cached_tokens = last.num_cached_tokens
    if not is_done:
        record.error = "the stream ended without [DONE]"
    elif not record.event_s:
        record.error = "the stream ended without a token"


def open_session(api_key: str, timeout_s: float) -> aiohttp.ClientSession:
    """A session without a limit of connections."""
    headers: dict[str, Any] = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers,
        # The longest line that can be read is twice this.
        read_bufsize=1 << 20,
    )
