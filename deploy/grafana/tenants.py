"""Who uses the service, and how they are served."""

from __future__ import annotations

from deploy.grafana.panels import MODEL, TENANT, Dashboard, Panel, Query, Row, quantiles

_OF = ',model=~"$model",tenant=~"$tenant"'
_TENANT = ',tenant=~"$tenant"'


def _by_tenant(counter: str, labels: str = _OF) -> Query:
    return Query(f"sum by (tenant) (rate({counter}{{*{labels}}}[$__rate_interval]))", "{{tenant}}")


_USE = Row(
    "Use",
    [
        Panel(
            title="Prompts",
            description="By tenant: those of the tenants' file by name, all others as `other`, "
            "nameless ones as `none`.",
            queries=[_by_tenant("rhizome_gateway_prompts_total")],
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Output tokens",
            description="Generated for each tenant.",
            queries=[_by_tenant("rhizome_gateway_output_tokens_total")],
            stacked=True,
        ),
        Panel(
            title="Prompt tokens",
            description="Sent by each tenant, cached ones included.",
            queries=[_by_tenant("rhizome_gateway_prompt_tokens_total")],
            stacked=True,
        ),
        Panel(
            title="Share of the service",
            description="Weighted tokens that each tenant was charged. Under overload shares "
            "should be as the weights in the tenants' file.",
            queries=[
                Query(
                    f"sum by (tenant) (rate(rhizome_scheduler_tenant_service_total{{*{_TENANT}}}"
                    "[$__rate_interval])) / scalar(clamp_min(sum(rate("
                    "rhizome_scheduler_tenant_service_total{*}[$__rate_interval])), 1e-9))",
                    "{{tenant}}",
                )
            ],
            unit="percentunit",
            stacked=True,
        ),
        Panel(
            title="Hit rate",
            description="Share of a tenant's prompt tokens that a cache held. Low: its prompts "
            "differ early; what changes belongs at their end.",
            queries=[
                Query(
                    f"sum by (tenant) (rate(rhizome_gateway_cached_tokens_total{{*{_OF}}}"
                    "[$__rate_interval])) / clamp_min(sum by (tenant) (rate("
                    f"rhizome_gateway_prompt_tokens_total{{*{_OF}}}[$__rate_interval])), 1e-9)",
                    "{{tenant}}",
                )
            ],
            unit="percentunit",
            most=1,
        ),
        Panel(
            title="Tenants that wait",
            description="How many have requests in a queue, and the largest distance of their "
            "service counters: about one request's tokens while shares are fair.",
            queries=[
                Query("sum(rhizome_scheduler_tenants_waiting{*})", "tenants"),
                Query("max(rhizome_scheduler_tenant_counter_gap{*})", "counter gap"),
            ],
        ),
    ],
)

_SERVED = Row(
    "How they are served",
    [
        Panel(
            title="Time to first token, p95",
            description="One tenant far above the others: it sends more than its share, or its "
            "weight is too small.",
            queries=quantiles(
                "rhizome_gateway_time_to_first_token_seconds", _OF, by="tenant", shares=(0.95,)
            ),
            unit="s",
            bad=3,
        ),
        Panel(
            title="Time per output token, p95",
            description="As each tenant's clients see it.",
            queries=quantiles(
                "rhizome_gateway_time_per_output_token_seconds", _OF, by="tenant", shares=(0.95,)
            ),
            unit="s",
        ),
        Panel(
            title="Request latency, p95",
            description="From arrival to the end.",
            queries=quantiles(
                "rhizome_gateway_request_latency_seconds", _OF, by="tenant", shares=(0.95,)
            ),
            unit="s",
        ),
        Panel(
            title="Wait for a worker, p95",
            description="From asking a scheduler until a worker was named.",
            queries=quantiles("rhizome_gateway_queue_seconds", _OF, by="tenant", shares=(0.95,)),
            unit="s",
        ),
        Panel(
            title="Refused: overload and limits",
            description="Prompts that got a 429. Over limits per minute see the next panel; else "
            "the queue, or the tenant's own bound, was full.",
            queries=[
                Query(
                    "sum by (tenant) (rate(rhizome_gateway_prompts_total"
                    f'{{*{_OF},outcome="overloaded"}}[$__rate_interval])) or vector(0)',
                    "{{tenant}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            title="Over a limit per minute",
            description="Requests refused by requests_per_minute or tokens_per_minute of the "
            "tenants' file.",
            queries=[
                Query(
                    "sum by (tenant, limit) (rate(rhizome_gateway_rate_limited_total"
                    f"{{*{_TENANT}}}[$__rate_interval])) or vector(0)",
                    "{{tenant}} {{limit}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            title="Failed",
            description="Prompts that ended in a failure of the service's.",
            queries=[
                Query(
                    "sum by (tenant) (rate(rhizome_gateway_prompts_total"
                    f'{{*{_OF},outcome="failed"}}[$__rate_interval])) or vector(0)',
                    "{{tenant}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            title="Refused: their own fault",
            description="Prompts that a scheduler or worker could not take as they are. Many: tell "
            "the tenant. (Bad parameters are refused before, as requests with status 400.)",
            queries=[
                Query(
                    "sum by (tenant) (rate(rhizome_gateway_prompts_total"
                    f'{{*{_OF},outcome="refused"}}[$__rate_interval])) or vector(0)',
                    "{{tenant}}",
                )
            ],
            unit="reqps",
        ),
        Panel(
            title="Cancelled",
            description="Prompts whose client left. Many: its timeout is shorter than the wait.",
            queries=[
                Query(
                    "sum by (tenant) (rate(rhizome_gateway_prompts_total"
                    f'{{*{_OF},outcome="cancelled"}}[$__rate_interval])) or vector(0)',
                    "{{tenant}}",
                )
            ],
            unit="reqps",
        ),
    ],
)

TENANTS = Dashboard(
    slug="tenants",
    title="Rhizome / Tenants",
    description="Who uses the service, and how each tenant is served.",
    rows=[_USE, _SERVED],
    variables=[MODEL, TENANT],
)
