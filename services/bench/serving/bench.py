"""`rhizome bench serving`: warm-up, runs, report."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import aiohttp

from services.bench.presets import Arrival
from services.bench.progress import ProgressBar
from services.bench.serving.client import RequestRecord, open_session
from services.bench.serving.config import ServingConfig
from services.bench.serving.load import ClientLostError, Target, run_load
from services.bench.serving.plot import draw
from services.bench.serving.report import RunFigures, format_report, headlines, summarize
from services.bench.workloads import Workload

_CONTROL_TIMEOUT_S = 30.0
_MAX_REASON_CHARS = 200
_WARMUP_SEED = 99
_MAX_WARMUP_OUTPUT = 64
# What servers answer that say who they are, in the order they are asked.
_IDENTITY_PATHS = ("/version", "/get_server_info")
# SGLang's and ours; vLLM's.
_FLUSH_PATHS = ("/flush_cache", "/reset_prefix_cache")


class ServerError(Exception):
    """The server cannot be measured; the message says why."""


def bench_serving(config: ServingConfig) -> None:
    """Measure and report. Raises ServerError; exits with 1 when no request succeeded."""
    try:
        model, identity = asyncio.run(_meet(config))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _no_answer(config, error) from error
    workload = config.flags.resolve()
    target = Target(
        base_url=config.base_url.rstrip("/"),
        backend=config.backend,
        model=model,
        sends_ids=config.sends_ids,
        api_key=config.api_key,
        timeout_s=config.timeout_s,
    )
    runs = _run_all(config, target, workload)
    figures = [summarize(records) for records in runs]
    title = f"{_name(config, identity)}  {_describe(workload, config.arrival)}"
    print(format_report(title, figures), flush=True)
    if config.output_file is not None:
        report = _report(config, target, workload, identity, runs, figures)
        config.output_file.write_text(json.dumps(report, indent=1) + "\n")
    if config.plot_file is not None:
        config.plot_file.write_text(draw(title, runs))
    if not any(run.num_succeeded for run in figures):
        sys.exit(1)


def _run_all(
    config: ServingConfig, target: Target, workload: Workload
) -> list[list[RequestRecord]]:
    try:
        if config.warmup_requests:
            _warm_up(config, target, workload)
        conversations = workload.conversations()
        runs = []
        for index in range(config.repeat):
            if config.flush_cache:
                asyncio.run(_flush(config))
            bar = ProgressBar(
                f"run {index + 1}/{config.repeat}",
                workload.num_requests,
                is_disabled=config.disable_progress,
            )
            runs.append(run_load(target, conversations, config.arrival, workload.seed, bar.update))
            bar.close()
    except ClientLostError as error:
        raise ServerError(str(error)) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _no_answer(config, error) from error
    return runs


def _warm_up(config: ServingConfig, target: Target, workload: Workload) -> None:
    """Requests of the workload's own lengths with other prompts. Raises ServerError."""
    shortest, longest = workload.output_len
    warmup = Workload(
        kind="random",
        num_prompts=config.warmup_requests,
        input_len=workload.input_len,
        output_len=(min(shortest, _MAX_WARMUP_OUTPUT), min(longest, _MAX_WARMUP_OUTPUT)),
        vocab_size=workload.vocab_size,
        seed=workload.seed + _WARMUP_SEED,
    )
    bar = ProgressBar("warm-up", warmup.num_requests, is_disabled=config.disable_progress)
    arrival = replace(config.arrival, request_rate=None, num_processes=1)
    records = run_load(target, warmup.conversations(), arrival, warmup.seed, bar.update)
    bar.close()
    if all(record.error is not None for record in records):
        raise ServerError(f"every warm-up request failed: {records[0].error}")


async def _meet(config: ServingConfig) -> tuple[str, dict[str, Any]]:
    """The model's name, and what the server says about itself."""
    async with open_session(config.api_key, _CONTROL_TIMEOUT_S) as session:
        identity = {
            path: answer
            for path in _IDENTITY_PATHS
            if (answer := await _get_json(session, config.base_url.rstrip("/") + path))
        }
        if config.model is not None or config.backend == "generate":
            return config.model or "default", identity
        models = await _get_json(session, config.base_url.rstrip("/") + "/v1/models")
    try:
        return str(models["data"][0]["id"]), identity
    except (KeyError, IndexError, TypeError):
        raise ServerError("the server lists no model; name one with --model") from None


async def _get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """An object, or an empty one where there is none."""
    async with session.get(url) as response:
        if response.status != 200:
            return {}
        try:
            answer = await response.json(content_type=None)
        except ValueError:
            return {}
    return answer if isinstance(answer, dict) else {}


async def _flush(config: ServingConfig) -> None:
    """Empty the server's prefix cache. Raises ServerError where it has no way to."""
    async with open_session(config.api_key, _CONTROL_TIMEOUT_S) as session:
        for path in _FLUSH_PATHS:
            async with session.post(config.base_url.rstrip("/") + path) as response:
                if response.status == 200:
                    return
    raise ServerError(f"the cache cannot be flushed: none of {', '.join(_FLUSH_PATHS)} answers 200")


def _no_answer(config: ServingConfig, error: Exception) -> ServerError:
    # A timeout has no text; what a server says that speaks something else has many lines.
    reason = " ".join(str(error).split())[:_MAX_REASON_CHARS] or type(error).__name__
    return ServerError(f"{config.base_url} does not answer: {reason}")


def _name(config: ServingConfig, identity: dict[str, Any]) -> str:
    if config.server_name is not None:
        return config.server_name
    version = identity.get("/version", {}).get("version")
    return f"{config.base_url} version {version}" if version else config.base_url


def _describe(workload: Workload, arrival: Arrival) -> str:
    count = f"{workload.num_requests} requests"
    if workload.kind != "random":
        count = f"{workload.num_groups} x {workload.prompts_per_group} requests"
    lengths = "in {}-{}, out {}-{}".format(*workload.input_len, *workload.output_len)
    rate = f", {arrival.request_rate:g} a second" if arrival.request_rate else ""
    limit = f", {arrival.max_concurrency} at once" if arrival.max_concurrency else ""
    return f"{workload.kind}: {count}, {lengths}{rate}{limit}, seed {workload.seed}"


def _report(
    config: ServingConfig,
    target: Target,
    workload: Workload,
    identity: dict[str, Any],
    runs: list[list[RequestRecord]],
    figures: list[RunFigures],
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "benchmark": "serving",
        "server": {"name": _name(config, identity), "url": target.base_url, "says": identity},
        "request": {
            "backend": target.backend,
            "model": target.model,
            "prompts": "ids" if target.sends_ids else "text",
        },
        "workload": {**asdict(workload), **asdict(config.arrival)},
        "protocol": {
            "runs": config.repeat,
            "warmup_requests": config.warmup_requests,
            "cache_flushed": config.flush_cache,
        },
        "client": {
            "command": "rhizome bench " + " ".join(sys.argv[1:]),
            "python": platform.python_version(),
            "aiohttp": aiohttp.__version__,
            "unix_s": int(time.time()),
        },
        "headlines": headlines(figures),
        "runs": [run.as_json() for run in figures],
    }
    if config.output_details:
        report["requests"] = [[_details(record) for record in records] for records in runs]
    return report


def _details(record: RequestRecord) -> dict[str, Any]:
    return {
        **asdict(record),
        "ttft_s": record.ttft_s if record.event_s else None,
        "tpot_s": record.tpot_s if record.event_s else None,
    }
