"""The gateway's own part of a trace, with scripted workers."""

from __future__ import annotations

import httpx

from services.common.telemetry import TelemetryFlags
from tests.e2e.system import free_port
from tests.fakes.gateway_stack import gateway_stack, until
from tests.fakes.otlp_collector import running_collector

BODY = {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


def telemetry(endpoint: str, ratio: float) -> TelemetryFlags:
    return TelemetryFlags(otlp_traces_endpoint=endpoint, trace_sample_ratio=ratio)


async def test_requests_are_answered_while_no_collector_can_be_reached() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    async with gateway_stack(telemetry=telemetry(endpoint, 1.0)) as stack:
        async with httpx.AsyncClient(base_url=stack.url) as http:
            for _ in range(20):
                response = await http.post("/v1/chat/completions", json=BODY)
                assert response.status_code == 200


async def test_a_share_of_the_requests_without_a_decision_is_recorded() -> None:
    with running_collector() as collector:
        async with gateway_stack(telemetry=telemetry(collector.endpoint, 0.5)) as stack:
            async with httpx.AsyncClient(base_url=stack.url) as http:
                headers = {"x-rhizome-trace": "1"}
                answers = [
                    (await http.post("/v1/chat/completions", json=BODY, headers=headers)).json()
                    for _ in range(40)
                ]
            submits = [submit for worker in stack.workers for submit in worker.submits]
    told = [answer["rhizome"].get("trace_id") for answer in answers]
    recorded = {trace_id for trace_id in told if trace_id}
    assert {span.trace_id for span in collector.spans} == recorded
    assert 0 < len(recorded) < 40
    attempts = [span for span in collector.spans if span.name == "attempt"]
    sent = {f"00-{span.trace_id}-{span.span_id}-01" for span in attempts}
    assert {submit.traceparent for submit in submits if submit.traceparent[-1] == "1"} == sent
    # The others say that nobody is to record them.
    assert all(submit.traceparent[-2:] in ("00", "01") for submit in submits)


async def test_several_prompts_are_one_request() -> None:
    body = {"model": "default", "prompt": ["one", "two"], "max_tokens": 5}
    with running_collector() as collector:
        async with gateway_stack(telemetry=telemetry(collector.endpoint, 1.0)) as stack:
            async with httpx.AsyncClient(base_url=stack.url) as http:
                usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    (root,) = [span for span in collector.spans if not span.parent_id]
    assert root.attributes["rhizome.num_prompts"] == 2
    assert root.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert len(root.attributes["gen_ai.response.finish_reasons"]) == 2
    assert len([span for span in collector.spans if span.name == "attempt"]) == 2
    assert len([span for span in collector.spans if span.name == "tokenize"]) == 1


async def test_a_session_that_was_resumed_shows_on_its_attempt() -> None:
    with running_collector() as collector:
        async with gateway_stack(telemetry=telemetry(collector.endpoint, 1.0)) as stack:
            stack.workers[0].break_at = 3
            async with httpx.AsyncClient(base_url=stack.url) as http:
                response = await http.post("/v1/chat/completions", json=BODY)
                assert response.status_code == 200
    (attempt,) = [span for span in collector.spans if span.name == "attempt"]
    assert [name for name, _, _ in attempt.events] == ["session_broken", "session_resumed"]
    assert attempt.failure is None


async def test_a_client_that_leaves_ends_its_trace() -> None:
    body = BODY | {"stream": True, "max_tokens": 1000, "ignore_eos": True}
    with running_collector() as collector:
        async with gateway_stack(telemetry=telemetry(collector.endpoint, 1.0)) as stack:
            async with httpx.AsyncClient(base_url=stack.url) as http:
                async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    await anext(response.aiter_lines())
            await until(lambda: not stack.pipeline.inflight.num_prompts)
    spans = {span.name: span for span in collector.spans}
    assert spans["attempt"].attributes["error.type"] == "CANCELLED"
    root = spans["POST /v1/chat/completions"]
    assert root.attributes["http.response.status_code"] == 499
    assert "gen_ai.response.finish_reasons" not in root.attributes


async def test_a_server_that_cannot_serve_fails_the_span() -> None:
    with running_collector() as collector:
        async with gateway_stack(telemetry=telemetry(collector.endpoint, 1.0)) as stack:
            stack.pipeline.inflight.admit(4096, "others")
            async with httpx.AsyncClient(base_url=stack.url) as http:
                refused = await http.post("/v1/chat/completions", json=BODY)
                missing = await http.post("/v1/chat/completions", json=BODY | {"model": "no"})
            stack.pipeline.inflight.leave(4096, "others")
    assert (refused.status_code, missing.status_code) == (429, 404)
    roots = [span for span in collector.spans if not span.parent_id]
    statuses = sorted(span.attributes["http.response.status_code"] for span in roots)
    assert statuses == [404, 429]
    assert all(span.failure is None for span in roots)
