"""CPU time of the gateway process per streamed token and per request.

    python -m bench.gateway_stream [--streams 256] [--tokens 400] [--step-ms 20] [--seconds 12]

Starts the tokenizer, the scheduler, a mock worker that emits one frame a step, and the gateway as
processes over Unix sockets, as `rhizome serve` does, and a load client in a process of its own over
loopback TCP. Two runs: long answers, and answers of one token. Together they tell the cost of a
token from that of a request: cpu = tokens * a + requests * b. Prints one JSON object; times are a
process's user and system time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "builtin"
TEXT = "The quick brown fox jumps over the lazy dog, and the river runs to the sea. "
_START_TIMEOUT_S = 60.0
_MEASURED = ("gateway", "tokenizer", "scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--gateway-wrapper", nargs="*", default=[], help="such as a profiler")
    # The load client's own arguments.
    parser.add_argument("--client-port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client_port is not None:
        uvloop.run(_client(args))
    else:
        print(json.dumps(_bench(args), indent=2))


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, _system(args, directory) as (port, processes):
        long = _run(args, port, processes, tokens=args.tokens)
        short = _run(args, port, processes, tokens=1)
    return {
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "streams": args.streams,
        "step_ms": args.step_ms,
        "long": long,
        "short": short,
        "solved": {name: _solve(name, long, short) for name in _MEASURED},
    }


def _solve(name: str, long: dict[str, Any], short: dict[str, Any]) -> dict[str, float]:
    """Cost of a token and of a request from two runs with different shares of each."""
    tokens = (long["tokens"], short["tokens"])
    requests = (long["requests"], short["requests"])
    cpu = [run["user_s"][name] + run["system_s"][name] for run in (long, short)]
    determinant = tokens[0] * requests[1] - tokens[1] * requests[0]
    per_token = (cpu[0] * requests[1] - cpu[1] * requests[0]) / determinant
    per_request = (tokens[0] * cpu[1] - tokens[1] * cpu[0]) / determinant
    return {"us_per_token": round(per_token * 1e6, 2), "us_per_request": round(per_request * 1e6)}


def _run(
    args: argparse.Namespace, port: int, processes: dict[str, psutil.Process], *, tokens: int
) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gateway_stream", "--client-port", str(port)]
    command += ["--streams", str(args.streams), "--tokens", str(tokens)]
    command += ["--seconds", str(args.seconds)]
    before = {name: processes[name].cpu_times() for name in _MEASURED}
    output = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    after = {name: processes[name].cpu_times() for name in _MEASURED}
    user = {name: round(after[name].user - before[name].user, 3) for name in _MEASURED}
    system = {name: round(after[name].system - before[name].system, 3) for name in _MEASURED}
    return {**json.loads(output.stdout), "user_s": user, "system_s": system}


@contextlib.contextmanager
def _system(
    args: argparse.Namespace, directory: str
) -> Iterator[tuple[int, dict[str, psutil.Process]]]:
    """All services as processes; the gateway's port and what to measure."""
    sockets = {
        name: f"unix:{directory}/{name}.sock"
        for name in ("tokenizer", "scheduler", "worker", "grpc")
    }
    port = free_port()
    commands = {
        "tokenizer": ["services.tokenizer", "--listen", sockets["tokenizer"]],
        "scheduler": ["services.scheduler", "--listen", sockets["scheduler"]],
        "worker": [
            *("tests.fakes.mock_worker", "--listen", sockets["worker"]),
            *("--scheduler", sockets["scheduler"], "--model-path", str(MODEL)),
            *("--text", TEXT, "--step-ms", str(args.step_ms)),
        ],
        "gateway": [
            *("services.gateway", "--port", str(port), "--grpc-listen", sockets["grpc"]),
            *("--schedulers", sockets["scheduler"], "--tokenizers", sockets["tokenizer"]),
        ],
    }
    started: dict[str, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        for name, (module, *flags) in commands.items():
            log = stack.enter_context(open(f"{directory}/{name}.log", "wb"))
            wrapper = args.gateway_wrapper if name == "gateway" else []
            started[name] = subprocess.Popen(
                [
                    *(wrapper or [sys.executable]),
                    *("-m", module, *flags, "--parent-pid", str(os.getpid())),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
            stack.callback(stop, started[name])
        wait_healthy(port, directory)
        yield port, {name: psutil.Process(started[name].pid) for name in _MEASURED}


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_healthy(port: int, directory: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        time.sleep(0.1)
    logs = [path.read_text()[-2000:] for path in sorted(Path(directory).glob("*.log"))]
    raise TimeoutError("the services did not start:\n" + "\n".join(logs))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class _Counts:
    requests: int = 0
    events: int = 0
    errors: int = 0


class _Stream(asyncio.Protocol):
    """One connection that sends the same request again and again until `stop_at`."""

    def __init__(self, request: bytes, counts: _Counts, stop_at: float) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._request = request
        self._counts = counts
        self._stop_at = stop_at
        self._tail = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._counts.events += data.count(b'"content":"')
        if b"HTTP/1.1 200" not in data and data.startswith(b"HTTP/1.1"):
            self._counts.errors += 1
            self._transport.close()
            return
        # The last chunk of a response; it may come in pieces.
        self._tail = (self._tail + data)[-8:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._tail = b""
            self._counts.requests += 1
            if time.monotonic() < self._stop_at:
                self._transport.write(self._request)
            else:
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def _client(args: argparse.Namespace) -> None:
    body = json.dumps(
        {
            "model": "default",
            "messages": [{"role": "user", "content": "Tell me about the sea."}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": args.tokens,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    counts = _Counts()
    started = time.monotonic()
    streams = []
    for _ in range(args.streams):
        _, stream = await loop.create_connection(
            lambda: _Stream(head.encode() + body, counts, started + args.seconds),
            "127.0.0.1",
            args.client_port,
        )
        streams.append(stream)
    await asyncio.gather(*(stream.done for stream in streams))
    print(
        json.dumps(
            {
                "requests": counts.requests,
                "tokens": counts.requests * args.tokens,
                # The first chunk of a request carries the role and no text.
                "chunks": counts.events - counts.requests,
                "errors": counts.errors,
                "seconds": round(time.monotonic() - started, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
