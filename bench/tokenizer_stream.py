"""CPU time of the tokenizer process per streamed token, and how long prompts disturb streams.

    python -m bench.tokenizer_stream [--tokenizer-path DIR] [--streams 256] [--steps 2000]

Starts `python -m services.tokenizer` and talks to it over a Unix socket from this process: one
message with one id for each of the streams per step, as the gateway sends them. Then the same with
stop strings, and at a pace of 100 steps a second alone and beside prompts of about 128k tokens
being encoded. Prints one JSON object; times are of the service's process (user and system),
latencies from write to read here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rhizome.tokenizer.v1 import (
    tokenizer_service_pb2 as pb,
    tokenizer_service_pb2_grpc as pb_grpc,
)
from services.common.rpc import open_channel

_ROOT = Path(__file__).resolve().parents[1]
_STOPS = ["\n\nUser:", "<|endoftext|>"]
_LONG_PROMPT_TOKENS = 128 * 1024
_PACE_S = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer-path", type=Path, help="default: the built-in model")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    uvloop.run(run(parser.parse_args()))


async def run(args: argparse.Namespace) -> None:
    async with running_tokenizer(args.tokenizer_path) as (stub, process):
        ids = await sample_ids(stub)
        result: dict[str, Any] = {
            "python": platform.python_version(),
            "cpus": psutil.cpu_count(),
            "streams": args.streams,
            "steps": args.steps,
            "vocab_size": (await stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest())).vocab_size,
        }
        for name, stops in (("plain", []), ("with_stops", _STOPS)):
            await stream(stub, ids, args.streams, args.steps // 10, stops)
            before = cpu_s(process)
            start = time.perf_counter()
            await stream(stub, ids, args.streams, args.steps, stops)
            tokens = args.streams * args.steps
            result[name] = {
                "cpu_us_per_token": round((cpu_s(process) - before) / tokens * 1e6, 3),
                "tokens_per_s": round(tokens / (time.perf_counter() - start)),
            }
        result["step_latency_ms"] = await latencies(stub, ids, args.streams)
    print(json.dumps(result, indent=2))


@asynccontextmanager
async def running_tokenizer(path: Path | None) -> AsyncIterator[tuple[Any, psutil.Process]]:
    flags = [] if path is None else ["--model-path", str(path)]
    with tempfile.TemporaryDirectory() as directory:
        address = f"unix:{directory}/tokenizer.sock"
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.tokenizer", "--listen", address, *flags),
            *("--log-level", "warning"),
            cwd=_ROOT,
        )
        try:
            async with open_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
                yield pb_grpc.TokenizerServiceStub(channel), psutil.Process(child.pid)
        finally:
            child.terminate()
            await child.wait()


async def sample_ids(stub: Any) -> list[int]:
    """Ids of this project's own prose and code."""
    files = [*(_ROOT / "docs").glob("*.md"), *(_ROOT / "services").rglob("*.py")]
    text = "\n".join(path.read_text() for path in sorted(files))
    request = pb.TokenizeRequest(inputs=[pb.TokenizeInput(text=text)])
    return list((await stub.Tokenize(request)).results[0].token_ids)


async def stream(
    stub: Any, ids: list[int], streams: int, steps: int, stops: list[str], pace_s: float = 0.0
) -> list[float]:
    """Run `streams` handles for `steps` steps; the latency of each step."""
    call = stub.StreamText()
    handles = list(range(streams))
    opening = pb.StreamTextRequest()
    for handle in handles:
        opening.opens.add(handle=handle).options.stop.extend(stops)
    await call.write(opening)
    await call.read()
    taken = []
    for step in range(steps):
        request = pb.StreamTextRequest(
            handles=handles,
            id_offsets=[step] * streams,
            num_ids=[1] * streams,
            token_ids=[ids[(handle * 97 + step) % len(ids)] for handle in handles],
        )
        start = time.perf_counter()
        await call.write(request)
        await call.read()
        taken.append(time.perf_counter() - start)
        if pace_s:
            await asyncio.sleep(pace_s)
    await call.done_writing()
    return taken


async def latencies(stub: Any, ids: list[int], streams: int) -> dict[str, Any]:
    """Latency of paced steps, alone and while long prompts are encoded one after another."""
    pieces = await stub.Detokenize(
        pb.DetokenizeRequest(
            sequences=[pb.TokenSequence(token_ids=(ids * 40)[:_LONG_PROMPT_TOKENS])]
        )
    )
    prompt = pb.TokenizeRequest(page_size=16)
    prompt.inputs.add(text=pieces.results[0].text)
    encoded: list[int] = []

    async def encode() -> None:
        while True:
            results = (await stub.Tokenize(prompt)).results
            encoded.append(len(results[0].token_ids))

    alone = await stream(stub, ids, streams, 300, [], _PACE_S)
    busy = asyncio.create_task(encode())
    beside = await stream(stub, ids, streams, 600, [], _PACE_S)
    busy.cancel()
    return {
        "alone": quantiles(alone),
        "beside_encoding": quantiles(beside),
        "prompts_encoded": len(encoded),
        "prompt_tokens": max(encoded, default=0),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3, 2)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
