"""`make demo`: the whole system on this host answers two chat requests, and says how.

Needs the `openai` package, as any client would.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from typing import Any, cast

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from services.common.logs import configure_logging
from services.common.process import run, stop_event
from services.launch.config import ServeConfig
from services.launch.supervisor import ServiceGaveUpError, Supervisor, private_directory
from services.launch.topology import build_topology

_QUESTIONS = ("What is the capital of France?", "And what is the capital of Japan?")


def main() -> None:
    """Exit 0 when both answers arrived; 1, with the services' last lines, when not."""
    configure_logging("demo", "error")
    try:
        run(demo())
    except ServiceGaveUpError as error:
        sys.exit(f"demo: {error}")


async def demo() -> None:
    """Start everything, ask, stop everything. Raises ServiceGaveUpError."""
    config = ServeConfig(port=_free_port(), log_level="warning")
    print(f"Starting gateway, tokenizer, scheduler, cache index, worker ({config.model_path.name})")
    started = time.monotonic()
    stop, ready = stop_event(), asyncio.Event()
    async with private_directory() as directory:
        specs = build_topology(config, directory, os.getpid())
        supervisor = Supervisor(specs, directory, lambda line: print(f"  {line}", file=sys.stderr))
        system = asyncio.create_task(supervisor.run(ready.set, stop))
        asking = asyncio.create_task(_ask_when_ready(ready, started, config))
        await asyncio.wait([system, asking], return_when=asyncio.FIRST_COMPLETED)
        finished = asking.done()
        asking.cancel()
        stop.set()
        await system
        print("\nStopped every service.")
        if not finished:
            sys.exit("demo: interrupted")
        asking.result()


async def _ask_when_ready(ready: asyncio.Event, started: float, config: ServeConfig) -> None:
    await ready.wait()
    print(f"All five are ready after {time.monotonic() - started:.1f} s")
    client = AsyncOpenAI(base_url=f"http://{config.host}:{config.port}/v1", api_key="none")
    messages: list[ChatCompletionMessageParam] = []
    for question in _QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = await _ask(client, messages)
        messages.append({"role": "assistant", "content": answer})
    await client.close()


async def _ask(client: AsyncOpenAI, messages: list[ChatCompletionMessageParam]) -> str:
    """Stream one answer to the terminal, then the way it travelled."""
    print(f"\n> {messages[-1].get('content')}")
    trace: dict[str, Any] = {}
    answer = ""
    stream = await client.chat.completions.create(
        model="default",
        messages=messages,
        temperature=0,
        stream=True,
        extra_headers={"x-rhizome-trace": "1"},
    )
    async for chunk in stream:
        trace = cast("dict[str, Any] | None", (chunk.model_extra or {}).get("rhizome")) or trace
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            answer += choice.delta.content or ""
    print(f"\n\n{_describe(trace)}")
    return answer


def _describe(trace: dict[str, Any]) -> str:
    """How a request travelled, a line a hop, in milliseconds."""
    first_ms = trace["first_token_ms"]
    work_ms = first_ms - trace["tokenize_ms"] - trace["schedule_ms"] - trace["worker_queue_ms"]
    rows = [
        ("gateway -> tokenizer", trace["tokenize_ms"], f"{trace['prompt_tokens']} prompt tokens"),
        ("gateway -> scheduler -> index", trace["schedule_ms"], f"by {trace['policy']}"),
        (f"{', '.join(trace['worker_ids'])}: queue", trace["worker_queue_ms"], ""),
        (
            "prefill, first token, its text",
            work_ms,
            f"{trace['cached_tokens']} prompt tokens came from the cache",
        ),
        (
            "other tokens",
            trace["total_ms"] - first_ms,
            f"{trace['output_tokens']} tokens in all",
        ),
    ]
    return "\n".join(f"  {name:<31}{ms:9.2f} ms   {note}" for name, ms, note in rows)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
