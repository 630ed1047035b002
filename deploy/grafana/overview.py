"""Whether all is well, and where to look when it is not."""

from __future__ import annotations

from deploy.grafana.panels import MODEL, Dashboard, Panel, Query, Row, quantiles

_GENERATING = 'endpoint=~"/v1/.*completions|/generate|/rhizome.inference.*"'
_FAILED = 'status=~"5..|INTERNAL|UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|DATA_LOSS"'
_MODEL = ',model=~"$model"'

_NOW = Row(
    "Now",
    [
        Panel(
            title="Prompts a second",
            description="Prompts that ended, of the models chosen above.",
            queries=[
                Query(
                    f"sum(rate(rhizome_gateway_prompts_total{{*{_MODEL}}}[$__rate_interval]))",
                    "prompts",
                )
            ],
            unit="reqps",
            kind="stat",
            width=3,
            height=4,
        ),
        Panel(
            title="Failing",
            description="Share of requests that end in a failure of the service's. Above 0: the "
            "gateway's log has event=request_failed and event=stream_failed with the reason.",
            queries=[
                Query(
                    f"(sum(rate(rhizome_gateway_requests_total{{*,{_GENERATING},{_FAILED}}}"
                    "[$__rate_interval])) or vector(0)) / clamp_min(sum(rate("
                    f"rhizome_gateway_requests_total{{*,{_GENERATING}}}[$__rate_interval])), 1e-9)",
                    "failing",
                )
            ],
            unit="percentunit",
            kind="stat",
            warn=0.001,
            bad=0.01,
            width=3,
            height=4,
        ),
        Panel(
            title="First token, p95",
            description="From a request's arrival to its first token. High: see where the time "
            "goes below; if it is the queue, more workers are needed.",
            queries=quantiles(
                "rhizome_gateway_time_to_first_token_seconds", _MODEL, shares=(0.95,)
            ),
            unit="s",
            kind="stat",
            warn=1.5,
            bad=3,
            width=3,
            height=4,
        ),
        Panel(
            title="Tokens a second",
            description="Generated, over all workers.",
            queries=[
                Query(
                    "sum(rate(rhizome_worker_output_tokens_total{*}[$__rate_interval]))", "tokens"
                )
            ],
            kind="stat",
            width=3,
            height=4,
        ),
        Panel(
            title="Requests that wait",
            description="In the schedulers' queues. If the number grows for minutes, add workers "
            "or bound the waits (--max-queue-wait-s).",
            queries=[Query("sum(rhizome_scheduler_queued_requests{*})", "waiting")],
            kind="stat",
            warn=10,
            bad=100,
            width=3,
            height=4,
        ),
        Panel(
            title="Ready workers",
            description="Workers that take new requests. 0: nothing is served; see the workers' "
            "logs for event=loading, event=not_ready and event=task_failed.",
            queries=[Query("sum(rhizome_worker_serving{*})", "ready")],
            kind="stat",
            falls=True,
            warn=1,
            bad=1,
            width=3,
            height=4,
        ),
        Panel(
            title="Cache in use",
            description="Share of the workers' pages that running sequences hold. Near 100 % "
            "sequences wait for pages, or give way to each other.",
            queries=[
                Query("sum(rhizome_worker_used_pages{*}) / sum(rhizome_worker_pages{*})", "used")
            ],
            unit="percentunit",
            kind="stat",
            warn=0.85,
            bad=0.95,
            width=3,
            height=4,
        ),
        Panel(
            title="Alerts",
            description="Alerts that fire now; docs/alerts.md says what to do for each.",
            queries=[
                Query(
                    'count(ALERTS{alertname=~"Rhizome.*",alertstate="firing"}) or vector(0)',
                    "firing",
                )
            ],
            kind="stat",
            warn=1,
            bad=3,
            width=3,
            height=4,
        ),
    ],
)

_REQUESTS = Row(
    "Requests",
    [
        Panel(
            title="Requests by status",
            description="What the APIs answered; a stream that failed counts under the error's "
            "status. 429 is overload or a tenant's limit (Tenants), 499 a client that left, 5xx "
            "ours.",
            queries=[
                Query(
                    "sum by (status) (rate(rhizome_gateway_requests_total"
                    f"{{*,{_GENERATING}}}[$__rate_interval]))",
                    "{{status}}",
                )
            ],
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Prompts by how they ended",
            description="A request may have several prompts. Refused: their own fault. "
            "Overloaded: no room, or over a limit.",
            queries=[
                Query(
                    "sum by (outcome) (rate(rhizome_gateway_prompts_total"
                    f"{{*{_MODEL}}}[$__rate_interval]))",
                    "{{outcome}}",
                )
            ],
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Prompts under way",
            description="Waiting for a worker to be named, and running on one. Many waiting with "
            "few running: workers are missing or broken (Routing and cache).",
            queries=[
                Query("sum(rhizome_gateway_queued_prompts{*})", "waiting"),
                Query("sum(rhizome_gateway_running_prompts{*})", "running"),
            ],
            stacked=True,
        ),
    ],
)

_LATENCY = Row(
    "Latency",
    [
        Panel(
            title="Time to first token",
            description="From arrival to the first token, as clients see it. A dot is a trace.",
            queries=quantiles("rhizome_gateway_time_to_first_token_seconds", _MODEL),
            unit="s",
            bad=3,
        ),
        Panel(
            title="Time per output token",
            description="Mean time between a choice's tokens. Uneven: prompts are computed in "
            "between; a smaller --chunked-prefill-size evens it.",
            queries=quantiles("rhizome_gateway_time_per_output_token_seconds", _MODEL),
            unit="s",
        ),
        Panel(
            title="Request latency",
            description="From arrival to the end; long outputs take long.",
            queries=quantiles("rhizome_gateway_request_latency_seconds", _MODEL),
            unit="s",
        ),
        Panel(
            title="Where the time to the first token goes",
            description="Means. Tokenizer: give it more threads or replicas. Waiting for a worker: "
            "add workers. Waiting in the worker: its batch is full (Engine).",
            queries=[
                Query(
                    'sum(rate(rhizome_tokenizer_seconds_sum{*,method="tokenize"}[$__rate_interval]'
                    ')) / clamp_min(sum(rate(rhizome_tokenizer_seconds_count{*,method="tokenize"}'
                    "[$__rate_interval])), 1e-9)",
                    "tokenizer",
                ),
                Query(
                    f"sum(rate(rhizome_gateway_queue_seconds_sum{{*{_MODEL}}}[$__rate_interval])) "
                    f"/ clamp_min(sum(rate(rhizome_gateway_queue_seconds_count{{*{_MODEL}}}"
                    "[$__rate_interval])), 1e-9)",
                    "waiting for a worker",
                ),
                Query(
                    "sum(rate(rhizome_worker_queue_seconds_sum{*}[$__rate_interval])) / clamp_min("
                    "sum(rate(rhizome_worker_queue_seconds_count{*}[$__rate_interval])), 1e-9)",
                    "waiting in the worker",
                ),
                Query(
                    "sum(rate(rhizome_gateway_time_to_first_token_seconds_sum"
                    f"{{*{_MODEL}}}[$__rate_interval])) / clamp_min(sum(rate("
                    f"rhizome_gateway_time_to_first_token_seconds_count{{*{_MODEL}}}"
                    "[$__rate_interval])), 1e-9)",
                    "all of it",
                ),
            ],
            unit="s",
        ),
        Panel(
            title="Tokens",
            description="Prompt tokens, those of them that a cache held, and generated ones.",
            queries=[
                Query(
                    f"sum(rate(rhizome_gateway_prompt_tokens_total{{*{_MODEL}}}[$__rate_interval]))",
                    "prompt",
                ),
                Query(
                    f"sum(rate(rhizome_gateway_cached_tokens_total{{*{_MODEL}}}[$__rate_interval]))",
                    "cached",
                ),
                Query(
                    f"sum(rate(rhizome_gateway_output_tokens_total{{*{_MODEL}}}[$__rate_interval]))",
                    "output",
                ),
            ],
        ),
        Panel(
            title="Faults that clients did not see",
            description="Choices that went on elsewhere, clients cut off because they did not "
            "read, prompts placed without a scheduler. They cost time: find the worker or "
            "scheduler that fails.",
            queries=[
                Query("sum(rate(rhizome_gateway_migrations_total{*}[$__rate_interval]))", "moved"),
                Query(
                    "sum(rate(rhizome_gateway_slow_readers_total{*}[$__rate_interval]))",
                    "slow readers",
                ),
                Query(
                    "sum(rate(rhizome_gateway_placed_without_scheduler_total{*}"
                    "[$__rate_interval]))",
                    "without scheduler",
                ),
                Query(
                    "sum(rate(rhizome_scheduler_worker_failures_total{*}[$__rate_interval]))",
                    "worker failures",
                ),
            ],
            unit="ops",
        ),
    ],
)

_PROCESSES = Row(
    "Processes",
    [
        Panel(
            title="Memory",
            description="Resident memory of every process. One that grows for hours leaks: note "
            "its version and restart it.",
            queries=[
                Query("process_resident_memory_bytes{*}", "{{instance}}"),
                Query(
                    "rhizome_worker_engine_process_resident_memory_bytes{*}", "{{instance}} engine"
                ),
            ],
            unit="bytes",
        ),
        Panel(
            title="CPU",
            description="Cores that each process uses. A gateway near 1 is full: add another.",
            queries=[
                Query("rate(process_cpu_seconds_total{*}[$__rate_interval])", "{{instance}}"),
                Query(
                    "rate(rhizome_worker_engine_process_cpu_seconds_total{*}[$__rate_interval])",
                    "{{instance}} engine",
                ),
            ],
        ),
        Panel(
            title="Event-loop lag, p99",
            description="How late each process runs what is due. Above 10 ms something holds it: "
            "too little CPU, or too much for one process.",
            queries=quantiles("rhizome_event_loop_lag_seconds", by="instance", shares=(0.99,)),
            unit="s",
            warn=0.01,
            bad=0.1,
        ),
        Panel(
            title="Open files",
            description="A number that only grows is a leak; connections count.",
            queries=[Query("process_open_fds{*}", "{{instance}}")],
        ),
        Panel(
            title="Targets that do not answer",
            description="Processes that Prometheus knows and cannot reach.",
            queries=[Query("count(up{*} == 0) or vector(0)", "down")],
            bad=1,
        ),
        Panel(
            title="Redis",
            description="1 while Redis answers; without Redis nothing is shown but 0 failures. "
            "Requests do not need it.",
            queries=[
                Query("min(rhizome_gateway_redis_up{*}) or vector(0)", "gateways"),
                Query("min(rhizome_scheduler_redis_up{*}) or vector(0)", "schedulers"),
                Query(
                    "sum(rate(rhizome_gateway_redis_failures_total{*}[$__rate_interval])) "
                    "or vector(0)",
                    "gateways' failures a second",
                ),
                Query(
                    "sum(rate(rhizome_scheduler_redis_failures_total{*}[$__rate_interval])) "
                    "or vector(0)",
                    "schedulers' failures a second",
                ),
            ],
        ),
    ],
)

OVERVIEW = Dashboard(
    slug="overview",
    title="Rhizome / Overview",
    description="Whether all is well: requests, latency, tokens, processes.",
    rows=[_NOW, _REQUESTS, _LATENCY, _PROCESSES],
    variables=[MODEL],
)
