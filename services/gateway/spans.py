"""What a request's own span says, HTTP or gRPC; by OpenTelemetry's names where it has them.

`gen_ai.latency.*` are SGLang's, in seconds. Called only for requests that are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_STOP
from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from services.common.spans import AttributeValue, Span, unix_ns
from services.gateway.exchange import Exchange
from services.gateway.generation import Choice, GenerationSpec
from services.gateway.pipeline import Generation

_PROVIDER = "rhizome"


def begin_http(exchange: Exchange, route: str, operation: str, span: Span) -> None:
    """What is known before the body: the HTTP request and what it is for."""
    span.set_standard(
        {
            "http.request.method": exchange.scope["method"],
            "http.route": route,
            "url.path": exchange.scope["path"],
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDER,
        }
    )
    span.set(tenant=exchange.tenant or None)


def end_http(exchange: Exchange) -> None:
    """The answer's status, and what generations of it there were."""
    exchange.span.set_standard({"http.response.status_code": exchange.status})
    exchange.span.set(request_id=exchange.request_id)
    describe_answer(exchange.span, exchange.generations)
    exchange.span.end()


def begin_rpc(span: Span, operation: str, spec: GenerationSpec) -> None:
    """A call of the public gRPC API, validated."""
    span.set_standard(
        {
            "rpc.system": "grpc",
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDER,
        }
    )
    span.set(tenant=spec.tenant or None, request_id=spec.request_id)


def describe_request(span: Span, model: str, specs: Sequence[GenerationSpec]) -> None:
    """What the client asked for; the first prompt's parameters where there are several."""
    first = specs[0]
    attributes: dict[str, AttributeValue] = {"gen_ai.request.model": model}
    attributes |= _sampling_attributes(first.sampling)
    if first.num_choices > 1:
        attributes["gen_ai.request.choice.count"] = first.num_choices
    if first.session_id:
        attributes["gen_ai.conversation.id"] = first.session_id
    span.set_standard(attributes)
    if len(specs) > 1:
        span.set(num_prompts=len(specs))


def describe_answer(span: Span, generations: Sequence[Generation]) -> None:
    """What all prompts together took and gave; times are those of the slowest."""
    choices = [choice for generation in generations for choice in generation.choices]
    if not choices:
        return
    attributes: dict[str, AttributeValue] = {
        "gen_ai.response.model": generations[0].prompt.model,
        "gen_ai.usage.input_tokens": sum(len(g.prompt.token_ids) for g in generations),
        "gen_ai.usage.output_tokens": sum(g.num_output_tokens for g in generations),
        "gen_ai.usage.cache_read.input_tokens": sum(g.cached_tokens for g in generations),
        "gen_ai.latency.e2e": max(g.elapsed_s for g in generations),
        "gen_ai.latency.time_in_queue": max(
            g.hops.queue_s + max(choice.queue_ns for choice in g.choices) / 1e9 for g in generations
        ),
        "gen_ai.latency.time_in_model_prefill": max(c.prefill_ns for c in choices) / 1e9,
        "gen_ai.latency.time_in_model_decode": max(c.decode_ns for c in choices) / 1e9,
    }
    if all(choice.finish is not None for choice in choices):
        attributes["gen_ai.response.finish_reasons"] = [_reason(choice) for choice in choices]
    firsts = [g.first_token_s for g in generations if g.first_token_s]
    if firsts:
        attributes["gen_ai.latency.time_to_first_token"] = min(firsts) - generations[0].arrival_s
        span.add_event("first_token", unix_ns(min(firsts)))
    span.set_standard(attributes)


def _reason(choice: Choice) -> str:
    is_stop = choice.finish is not None and choice.finish.reason == FINISH_REASON_STOP
    return "stop" if is_stop else "length"


def _sampling_attributes(sampling: SamplingParams) -> dict[str, AttributeValue]:
    """The parameters that were given, and the limit that holds."""
    attributes: dict[str, AttributeValue] = {}
    if sampling.HasField("max_new_tokens"):
        attributes["gen_ai.request.max_tokens"] = sampling.max_new_tokens
    if sampling.HasField("temperature"):
        attributes["gen_ai.request.temperature"] = _shortest(sampling.temperature)
    if sampling.HasField("top_p"):
        attributes["gen_ai.request.top_p"] = _shortest(sampling.top_p)
    if sampling.HasField("top_k"):
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.HasField("frequency_penalty"):
        attributes["gen_ai.request.frequency_penalty"] = _shortest(sampling.frequency_penalty)
    if sampling.HasField("presence_penalty"):
        attributes["gen_ai.request.presence_penalty"] = _shortest(sampling.presence_penalty)
    return attributes


def _shortest(value: float) -> float:
    """The decimal number that a 32-bit float stands for: 0.7, not 0.699999988."""
    return float(f"{value:.7g}")
