"""One trace of a request through the real services, which are processes of their own."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from rhizome.inference.v1.inference_service_pb2 import GenerateRequest
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.fakes.cluster import Cluster, running_cluster
from tests.fakes.otlp_collector import CollectedSpan, OtlpCollector, running_collector

SERVICES = ("GATEWAY", "TOKENIZER", "SCHEDULER", "CACHE_INDEX", "WORKER")
HTTP_SPAN = "POST /v1/chat/completions"
TOKENIZE = "rhizome.tokenizer.v1.TokenizerService/Tokenize"
SCHEDULE = "rhizome.scheduler.v1.SchedulerService/Schedule"
MATCH = "rhizome.cache_index.v1.CacheIndexService/MatchPrefix"
GENERATE = "rhizome.worker.v1.WorkerService/Generate"
# Of a prompt that every worker computes for longer than a page.
QUESTION = "Tell me of the sea, of the rivers that run to it, and of the rain that fills them. " * 4


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster(collector: OtlpCollector) -> Iterator[Cluster]:
    """Records what its clients decide to have recorded, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for service in SERVICES:
            prefix = f"RHIZOME__{service}__"
            patch.setenv(f"{prefix}OTLP_TRACES_ENDPOINT", collector.endpoint)
            patch.setenv(f"{prefix}TRACE_SAMPLE_RATIO", "0")
            patch.setenv(f"{prefix}LOG_FORMAT", "json")
        patch.setenv("RHIZOME__GATEWAY__METRICS_PORT", "0")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with running_cluster(
            num_schedulers=1, num_gateways=1, num_workers=2, step_floor_ms=20
        ) as cluster:
            yield cluster


def traceparent(trace_id: str, flags: str = "01") -> str:
    return f"00-{trace_id}-b7ad6b7169203331-{flags}"


def chat(cluster: Cluster, headers: dict[str, str], **more: object) -> httpx.Response:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "ignore_eos": True,
        **more,
    }
    url = f"{cluster.urls[0]}/v1/chat/completions"
    response = httpx.post(url, json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return response


def traced(
    collector: OtlpCollector, send: Callable[[dict[str, str]], object], num_sequences: int = 1
) -> list[CollectedSpan]:
    """All spans of what `send` asks with these headers, which the index was asked about, too.

    On a busy machine it may not have answered in time lately, and is left alone for a while.
    """
    for _ in range(20):
        trace_id = secrets.token_hex(16)
        send({"traceparent": traceparent(trace_id), "tracestate": "vendor=1"})
        spans = collector.trace(trace_id, ended(num_sequences, "match"))
        if not one(spans, "match").attributes["rhizome.is_skipped"]:
            return collector.trace(trace_id, ended(num_sequences, "match", MATCH))
        time.sleep(0.5)
    raise TimeoutError("the scheduler never asks the index")


def ended(num_sequences: int, *more: str) -> Callable[[list[CollectedSpan]], bool]:
    """Every service has sent its spans of a request with so many choices that went well."""
    wanted = {"tokenize", TOKENIZE, "schedule", SCHEDULE, "attempt", "decode", *more}

    def is_whole(spans: list[CollectedSpan]) -> bool:
        names = [span.name for span in spans]
        has_root = any(name.startswith("POST") for name in names)
        return has_root and wanted <= set(names) and names.count(GENERATE) >= num_sequences

    return is_whole


def one(spans: list[CollectedSpan], name: str) -> CollectedSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def test_a_chat_is_one_connected_trace_from_http_to_the_engine(
    cluster: Cluster, collector: OtlpCollector
) -> None:
    answers: list[httpx.Response] = []
    spans = traced(collector, lambda headers: answers.append(chat(cluster, headers)))
    usage = answers[-1].json()["usage"]

    parents = {span.name: next((p.name for p in spans if p.span_id == span.parent_id), None)
               for span in spans}  # fmt: skip
    assert parents == {
        HTTP_SPAN: None,
        "tokenize": HTTP_SPAN,
        TOKENIZE: "tokenize",
        "schedule": HTTP_SPAN,
        SCHEDULE: "schedule",
        "match": SCHEDULE,
        MATCH: "match",
        "attempt": HTTP_SPAN,
        GENERATE: "attempt",
        "queue": GENERATE,
        "prefill": GENERATE,
        "decode": GENERATE,
    }
    assert {(span.service, span.kind) for span in spans} == {
        ("rhizome-gateway", "server"),
        ("rhizome-gateway", "client"),
        ("rhizome-tokenizer", "server"),
        ("rhizome-scheduler", "server"),
        ("rhizome-scheduler", "client"),
        ("rhizome-cache-index", "server"),
        ("rhizome-worker", "server"),
        ("rhizome-worker", "internal"),
    }
    root = one(spans, HTTP_SPAN)
    assert root.parent_id == "b7ad6b7169203331"
    assert root.trace_state == "vendor=1"
    _check_root(root, usage)
    _check_services(spans, usage)
    _check_times(spans, root)


def _check_root(root: CollectedSpan, usage: dict[str, Any]) -> None:
    said = dict(root.attributes)
    for name in ("e2e", "time_in_queue", "time_to_first_token"):
        assert said.pop(f"gen_ai.latency.{name}") > 0
    for name in ("time_in_model_prefill", "time_in_model_decode"):
        assert 0 < said.pop(f"gen_ai.latency.{name}") < root.attributes["gen_ai.latency.e2e"]
    assert len(said.pop("rhizome.request_id")) == 32
    model = said.pop("gen_ai.response.model")
    assert model
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "rhizome",
        "gen_ai.request.model": "default",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert [name for name, _, _ in root.events] == ["first_token"]


def _check_services(spans: list[CollectedSpan], usage: dict[str, Any]) -> None:
    scheduled = one(spans, SCHEDULE).attributes
    sequence = one(spans, GENERATE).attributes
    attempt = one(spans, "attempt").attributes
    assert one(spans, TOKENIZE).attributes == {
        "rhizome.num_prompts": 1,
        "rhizome.num_prompt_tokens": usage["prompt_tokens"],
    }
    assert scheduled["rhizome.policy"].startswith("prefix_load/")
    assert scheduled["rhizome.num_candidates"] == 2
    assert 0 <= scheduled["rhizome.predicted_cached_tokens"] < usage["prompt_tokens"]
    assert scheduled["rhizome.queue_s"] >= 0
    assert scheduled["rhizome.worker_id"] == attempt["rhizome.worker_id"]
    assert one(spans, MATCH).attributes["rhizome.num_pages"] == usage["prompt_tokens"] // 16
    assert (attempt["rhizome.attempt"], attempt["rhizome.num_choices"]) == (0, 1)
    assert sequence["rhizome.finish_reason"] == "length"
    assert sequence["rhizome.num_output_tokens"] == 8
    assert one(spans, GENERATE).resource["service.instance.id"] == attempt["rhizome.worker_id"]
    assert [name for name, _, _ in one(spans, "prefill").events] == ["first_token"]


def _check_times(spans: list[CollectedSpan], root: CollectedSpan) -> None:
    """Nothing ends before it begins; the phases of a sequence follow each other inside it."""
    assert all(span.start_ns <= span.end_ns for span in spans)
    sequence = one(spans, GENERATE)
    queue, prefill, decode = (one(spans, name) for name in ("queue", "prefill", "decode"))
    assert sequence.start_ns == queue.start_ns <= queue.end_ns == prefill.start_ns
    assert prefill.end_ns == decode.start_ns <= decode.end_ns <= sequence.end_ns
    # By the clock of one host, and by rounding of floats in between.
    assert root.start_ns - 1_000_000 <= sequence.start_ns
    assert sequence.end_ns <= root.end_ns + 1_000_000


def test_choices_share_an_attempt_and_a_cached_prompt_shows(
    cluster: Cluster, collector: OtlpCollector
) -> None:
    chat(cluster, {})
    spans = traced(collector, lambda headers: chat(cluster, headers, n=3), 3)
    attempt = one(spans, "attempt")
    sequences = [span for span in spans if span.name == GENERATE]
    assert {span.parent_id for span in sequences} == {attempt.span_id}
    assert {span.attributes["rhizome.choice_index"] for span in sequences} == {0, 1, 2}
    assert attempt.attributes["rhizome.cached_tokens"] > 0
    assert one(spans, SCHEDULE).attributes["rhizome.policy"] == "prefix_load/affinity"
    assert one(spans, HTTP_SPAN).attributes["gen_ai.request.choice.count"] == 3


def test_a_request_that_moves_to_another_worker_stays_one_trace(
    cluster: Cluster, collector: OtlpCollector
) -> None:
    trace_id = secrets.token_hex(16)
    body = {
        "text": QUESTION,
        "stream": True,
        "sampling_params": {"max_new_tokens": 60, "ignore_eos": True},
    }
    headers = {"traceparent": traceparent(trace_id)}
    with httpx.stream(
        "POST", f"{cluster.urls[0]}/generate", json=body, headers=headers, timeout=60
    ) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        victim = next(
            worker
            for worker in ("worker-0", "worker-1")
            if cluster.service_metric(worker, "rhizome_worker_running_sequences")
        )
        cluster.processes[victim].kill()
        cluster.processes[victim].wait()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    try:
        spans = collector.trace(trace_id, ended(1))
        _check_migration(spans, victim.replace("orker-", ""))
        record = next(
            fields
            for fields in json_lines(cluster.log("gateway-0"))
            if fields.get("event") == "request_migrates"
        )
        assert record["trace_id"] == trace_id
    finally:
        cluster.start(victim)
        cluster.wait_for("scheduler-0", "event=worker_registered", times=3)


def _check_migration(spans: list[CollectedSpan], victim: str) -> None:
    root = one(spans, "POST /generate")
    first, second = [span for span in spans if span.name == "attempt"]
    assert (first.parent_id, second.parent_id) == (root.span_id, root.span_id)
    assert first.attributes["rhizome.worker_id"] == victim
    assert first.failure
    assert first.attributes["error.type"] == "ABORTED"
    assert "session_broken" in [name for name, _, _ in first.events]
    assert second.attributes["rhizome.worker_id"] != victim
    assert second.failure is None
    assert [name for name, _, _ in root.events] == ["migration", "first_token"]
    assert len([span for span in spans if span.name == "schedule"]) == 2
    sequence = one(spans, GENERATE)
    assert sequence.parent_id == second.span_id
    assert sequence.attributes["rhizome.num_resumed_tokens"] > 0
    # The dead worker's part never left it; what came hangs together all the same.
    known = {span.span_id for span in spans} | {root.parent_id}
    assert {span.parent_id for span in spans} <= known


def test_the_grpc_api_continues_its_callers_trace(
    cluster: Cluster, collector: OtlpCollector
) -> None:
    trace_id = secrets.token_hex(16)
    with grpc.insecure_channel(f"unix:{cluster.directory}/gateway-0.sock") as channel:
        request = GenerateRequest(model="default", text=QUESTION)
        request.sampling.max_new_tokens = 4
        metadata = (("traceparent", traceparent(trace_id)),)
        list(InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=60))
    name = "rhizome.inference.v1.InferenceService/Generate"
    spans = collector.trace(
        trace_id, lambda spans: {name, GENERATE, "attempt"} <= {s.name for s in spans}
    )
    root = one(spans, name)
    assert root.parent_id == "b7ad6b7169203331"
    assert root.attributes["rpc.system"] == "grpc"
    assert root.attributes["gen_ai.operation.name"] == "text_completion"
    assert root.attributes["gen_ai.usage.output_tokens"] == 4
    assert one(spans, "attempt").parent_id == root.span_id


def test_a_failed_request_says_why(cluster: Cluster, collector: OtlpCollector) -> None:
    trace_id = secrets.token_hex(16)
    url = f"{cluster.urls[0]}/v1/chat/completions"
    response = httpx.post(url, json={}, headers={"traceparent": traceparent(trace_id)})
    assert response.status_code == 400
    (root,) = collector.trace(trace_id, len)
    assert root.attributes["http.response.status_code"] == 400
    # The client's fault is no failure of the server.
    assert root.failure is None


def test_what_is_not_sampled_leaves_nothing(cluster: Cluster, collector: OtlpCollector) -> None:
    before = {span.trace_id for span in collector.spans}
    unwanted, wanted = secrets.token_hex(16), secrets.token_hex(16)
    chat(cluster, {"traceparent": traceparent(unwanted, "00")})
    chat(cluster, {})
    chat(cluster, {"traceparent": "nonsense"})
    httpx.get(f"{cluster.urls[0]}/health_generate", timeout=60)
    chat(cluster, {"traceparent": traceparent(wanted)})
    # Exports of all services come after each other, so what came before it is here.
    collector.trace(wanted, ended(1))
    time.sleep(1.5)
    assert {span.trace_id for span in collector.spans} - before == {wanted}


def test_every_log_line_is_json_and_names_the_trace(cluster: Cluster) -> None:
    trace_id = secrets.token_hex(16)
    chat(cluster, {"traceparent": traceparent(trace_id), "x-request-id": "logged"}, user="a b")
    for name in cluster.processes:
        for fields in json_lines(cluster.log(name)):
            assert {"ts", "level", "service", "logger", "message"} <= fields.keys()
    (record,) = [
        fields
        for fields in json_lines(cluster.log("gateway-0"))
        if fields.get("request_id") == "logged"
    ]
    assert record["event"] == "request_done"
    assert record["trace_id"] == trace_id
    assert re.fullmatch("[0-9a-f]{16}", record["span_id"])
    assert (record["service"], record["level"], record["user"]) == ("gateway", "info", "a b")
    assert record["output_tokens"] == 8


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_histograms_lead_to_traces_where_openmetrics_is_asked_for(cluster: Cluster) -> None:
    trace_id = secrets.token_hex(16)
    chat(cluster, {"traceparent": traceparent(trace_id)})
    asked = {"accept": "application/openmetrics-text; version=1.0.0, text/plain; version=0.0.4"}
    names = ("gateway-0", "scheduler-0", "worker-0")
    urls = {name: _metrics_url(cluster, name) for name in names}
    public = f"{cluster.urls[0]}/metrics"
    for url, names in (
        (public, ("time_to_first_token", "time_per_output_token", "request_latency")),
        (urls["gateway-0"], ("time_to_first_token", "request_latency")),
        (urls["scheduler-0"], ("queue",)),
        (urls["worker-0"], ()),
    ):
        response = httpx.get(url, headers=asked)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        # Raises for what is no OpenMetrics.
        assert len(list(text_string_to_metric_families(response.text))) > 5
        for name in names:
            (line, *_) = [
                line
                for line in response.text.splitlines()
                if f"{name}_seconds_bucket" in line and trace_id in line
            ]
            assert f'# {{trace_id="{trace_id}"}}' in line
        plain = httpx.get(url)
        assert plain.headers["content-type"].startswith("text/plain")
        assert "trace_id" not in plain.text


def _metrics_url(cluster: Cluster, name: str) -> str:
    ports = [
        fields["port"]
        for fields in json_lines(cluster.log(name))
        if fields.get("event") == "metrics_served"
    ]
    return f"http://127.0.0.1:{ports[-1]}/metrics"
