"""What tracing costs the gateway: CPU time a request with an exporter, against tracing off.

    python -m bench.tracing_cost [--ratios 0.01 1] [--rounds 10] [--seconds 4] [--streams 16]
        [--tokens 1 64] [--before CHECKOUT]

Gateways share a tokenizer, a scheduler and a mock worker: one without tracing, one for each ratio
of recorded requests, which exports to an OTLP server in this process, and one of another checkout,
where that is given. All are driven at the same time, in rounds of some seconds, so that what else
the machine does falls on them alike. A figure is the median over the rounds of user and system time
a request, and of its difference from that of the gateway without tracing in the same round. Prints
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bench.gateway_stream import MODEL, ROOT, TEXT, free_port, stop, wait_healthy

_OFF = "off"
_BEFORE = "before"
_WARM_UP_S = 2.0


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans and counts them."""

    def __init__(self) -> None:
        self.num_spans = 0

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.num_spans += sum(
            len(scope.spans)
            for resource in request.resource_spans
            for scope in resource.scope_spans
        )
        return trace_service_pb2.ExportTraceServiceResponse()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", nargs="+", default=["0.01", "1"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--streams", type=int, default=16, help="of each gateway")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--before", type=Path, help="a checkout whose gateway is compared, too")
    args = parser.parse_args()
    with _sink() as (sink, endpoint), _system(args, endpoint) as gateways:
        for _, port in gateways.values():
            _drive(port, args.streams, args.tokens[0], _WARM_UP_S)
        results = {f"{tokens} tokens": _compare(gateways, args, tokens) for tokens in args.tokens}
        report = {
            "python": platform.python_version(),
            "cpus": psutil.cpu_count(),
            "rounds": args.rounds,
            "seconds": args.seconds,
            "streams": args.streams,
            **results,
            "spans_exported": sink.num_spans,
        }
    print(json.dumps(report, indent=2))


Gateways = dict[str, tuple[psutil.Process, int]]


def _compare(gateways: Gateways, args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    rounds = []
    with ThreadPoolExecutor(len(gateways)) as pool:
        for _ in range(args.rounds):
            slices = {
                name: pool.submit(_slice, *gateway, args, tokens)
                for name, gateway in gateways.items()
            }
            rounds.append({name: one.result() for name, one in slices.items()})
    us = {name: [one[name]["us"] for one in rounds] for name in gateways}
    per_cent = {
        name: [100 * (one[name]["us"] / one[_OFF]["us"] - 1) for one in rounds]
        for name in gateways
        if name != _OFF
    }
    return {
        "us_per_request": {name: _spread(values) for name, values in us.items()},
        "added_per_cent": {name: _spread(values) for name, values in per_cent.items()},
        "requests": sum(one[name]["requests"] for one in rounds for name in gateways),
        "errors": sum(one[name]["errors"] for one in rounds for name in gateways),
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 1), "low": round(low, 1), "high": round(high, 1)}


def _slice(
    process: psutil.Process, port: int, args: argparse.Namespace, tokens: int
) -> dict[str, float]:
    before = process.cpu_times()
    counts = _drive(port, args.streams, tokens, args.seconds)
    after = process.cpu_times()
    cpu_s = after.user - before.user + after.system - before.system
    return {"us": cpu_s / counts["requests"] * 1e6, **counts}


def _drive(port: int, streams: int, tokens: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.gateway_stream", "--client-port", str(port)]
    command += ["--streams", str(streams), "--tokens", str(tokens), "--seconds", str(seconds)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    counts = json.loads(output.stdout)
    return {"requests": counts["requests"], "errors": counts["errors"]}


@contextlib.contextmanager
def _sink() -> Iterator[tuple[Sink, str]]:
    sink = Sink()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(sink, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield sink, f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


@contextlib.contextmanager
def _system(args: argparse.Namespace, endpoint: str) -> Iterator[Gateways]:
    """The processes and HTTP ports of the gateways, by what they record."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:

        def start(name: str, module: str, *flags: str, cwd: Path = ROOT) -> psutil.Process:
            log = stack.enter_context(open(f"{directory}/{name}.log", "wb"))
            command = [sys.executable, "-m", module, *flags, "--parent-pid", str(os.getpid())]
            process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)
            stack.callback(stop, process)
            return psutil.Process(process.pid)

        def address(name: str) -> str:
            return f"unix:{directory}/{name}.sock"

        start("tokenizer", "services.tokenizer", "--listen", address("tokenizer"))
        start("scheduler", "services.scheduler", "--listen", address("scheduler"))
        start(
            "worker",
            "tests.fakes.mock_worker",
            *("--listen", address("worker"), "--scheduler", address("scheduler")),
            *("--model-path", str(MODEL), "--text", TEXT, "--step-ms", str(args.step_ms)),
        )
        gateways: Gateways = {}
        for name in (_OFF, *args.ratios, *(() if args.before is None else (_BEFORE,))):
            port = free_port()
            traced = ("--otlp-traces-endpoint", endpoint, "--trace-sample-ratio", name)
            process = start(
                f"gateway-{name}",
                "services.gateway",
                *("--port", str(port), "--grpc-listen", address(f"grpc-{name}")),
                *("--schedulers", address("scheduler"), "--tokenizers", address("tokenizer")),
                *("--log-level", "warning", *(traced if name in args.ratios else ())),
                cwd=args.before if name == _BEFORE else ROOT,
            )
            wait_healthy(port, directory)
            gateways[name] = (process, port)
        yield gateways


if __name__ == "__main__":
    main()
