"""Where requests are placed and why, what waits, and whether the cache index is right."""

from __future__ import annotations

from deploy.grafana.panels import Dashboard, Panel, Query, Row, quantiles


def _rate(counter: str, labels: str = "") -> str:
    return f"sum(rate({counter}{{*{labels}}}[$__rate_interval]))"


_PLACEMENT = Row(
    "Placement",
    [
        Panel(
            title="Placements by policy and branch",
            description="`.../affinity` went to the best match, `.../spread` elsewhere for its "
            "load, `.../cold` had none. Mostly cold although prompts share beginnings: see the hit "
            "rates below.",
            queries=[
                Query(
                    "sum by (policy) (rate(rhizome_scheduler_placements_total{*}"
                    "[$__rate_interval]))",
                    "{{policy}}",
                )
            ],
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Time in the queue",
            description="From arrival at a scheduler to placement, by priority class. High for "
            "all: too few workers. High for `low` alone: higher classes fill the pool.",
            queries=quantiles("rhizome_scheduler_queue_seconds", by="priority", shares=(0.5, 0.95)),
            unit="s",
        ),
        Panel(
            title="Requests that wait",
            description="By priority class, over all schedulers.",
            queries=[
                Query("sum by (priority) (rhizome_scheduler_queued_requests{*})", "{{priority}}")
            ],
            stacked=True,
        ),
        Panel(
            title="Saturation",
            description="The fullest of what workers have room for: sequences, pages, prefill; by "
            "model. Autoscaling goes by it; near 1 more workers are needed.",
            queries=[
                Query("max by (model) (rhizome_scheduler_saturation{*})", "{{model}}"),
                Query("max by (model) (rhizome_scheduler_kv_used_ratio{*})", "{{model}} pages"),
            ],
            unit="percentunit",
            warn=0.8,
            bad=0.95,
        ),
        Panel(
            title="The oldest request's wait",
            description="Of those that wait now, by model.",
            queries=[
                Query("max by (model) (rhizome_scheduler_oldest_queued_seconds{*})", "{{model}}")
            ],
            unit="s",
        ),
        Panel(
            title="Refused and not placed",
            description="Sheds by reason (docs/overload-and-fairness.md says what each means), and "
            "other ends without a placement by status.",
            queries=[
                Query(
                    "sum by (reason) (rate(rhizome_scheduler_sheds_total{*}[$__rate_interval])) "
                    "or vector(0)",
                    "{{reason}}",
                ),
                Query(
                    "sum by (code) (rate(rhizome_scheduler_schedule_failures_total{*}"
                    "[$__rate_interval])) or vector(0)",
                    "{{code}}",
                ),
            ],
            unit="reqps",
        ),
    ],
)

_CACHE = Row(
    "Prefix cache",
    [
        Panel(
            title="Hit rate, predicted and actual",
            description="Share of prompt tokens that caches hold. Actual far below predicted: the "
            "index is behind, or workers evict what was promised.",
            queries=[
                Query(
                    f"{_rate('rhizome_scheduler_predicted_cached_tokens_total')} / clamp_min("
                    f"{_rate('rhizome_scheduler_reported_prompt_tokens_total')}, 1e-9)",
                    "predicted",
                ),
                Query(
                    f"{_rate('rhizome_scheduler_actual_cached_tokens_total')} / clamp_min("
                    f"{_rate('rhizome_scheduler_reported_prompt_tokens_total')}, 1e-9)",
                    "actual",
                ),
            ],
            unit="percentunit",
            most=1,
        ),
        Panel(
            title="Predicted and not there",
            description="Share of the predicted tokens that were not cached. Above 30 %: look at "
            "the index's lag, and at the workers' evictions.",
            queries=[
                Query(
                    f"{_rate('rhizome_scheduler_overpredicted_cached_tokens_total')} / clamp_min("
                    f"{_rate('rhizome_scheduler_predicted_cached_tokens_total')}, 1e-9)",
                    "missing",
                )
            ],
            unit="percentunit",
            bad=0.3,
        ),
        Panel(
            title="Hit rate by worker",
            description="One worker far below the others serves what fits no other's cache.",
            queries=[
                Query(
                    "rate(rhizome_worker_cached_prompt_tokens_total{*}[$__rate_interval])"
                    " / clamp_min("
                    "rate(rhizome_worker_prompt_tokens_total{*}[$__rate_interval]), 1e-9)",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
            most=1,
        ),
        Panel(
            title="Index lag",
            description="Age of a worker's newest cache event when the index applied it. Above a "
            "second: the index lacks CPU, or the network is slow.",
            queries=[Query("max by (worker) (rhizome_cache_index_lag_seconds{*})", "{{worker}}")],
            unit="s",
            bad=1,
        ),
        Panel(
            title="Workers followed",
            description="1 while a worker's cache events arrive. At 0 prompts are placed as if it "
            "held less: look for event=worker_unreached in the index's log.",
            queries=[Query("min by (worker) (rhizome_cache_index_following{*})", "{{worker}}")],
            falls=True,
            warn=1,
            bad=1,
        ),
        Panel(
            title="Pages indexed",
            description="What each worker holds, as the index knows it.",
            queries=[
                Query("max by (worker, tier) (rhizome_cache_index_pages{*})", "{{worker}} {{tier}}")
            ],
            stacked=True,
        ),
        Panel(
            title="Prefixes and their bound",
            description="At the bound the index drops the oldest: raise --max-pages.",
            queries=[
                Query("max by (instance) (rhizome_cache_index_prefixes{*})", "{{instance}} held"),
                Query(
                    "max by (instance) (rhizome_cache_index_max_prefixes{*})", "{{instance}} bound"
                ),
            ],
        ),
        Panel(
            title="Index faults",
            description="Snapshots taken again (events were missed), pages without a parent, "
            "prefixes dropped at the bound. All 0 when all is well.",
            queries=[
                Query(f"{_rate('rhizome_cache_index_resyncs_total')} or vector(0)", "resyncs"),
                Query(_rate("rhizome_cache_index_orphans_total"), "orphans"),
                Query(_rate("rhizome_cache_index_dropped_prefixes_total"), "dropped"),
            ],
            unit="ops",
        ),
        Panel(
            title="Questions without an answer",
            description="The index did not answer within 20 ms, or was skipped because it is "
            "silent: prompts are placed by load alone meanwhile.",
            queries=[
                Query(_rate("rhizome_scheduler_index_failures_total"), "late"),
                Query(_rate("rhizome_scheduler_index_skipped_total"), "skipped"),
            ],
            unit="ops",
        ),
    ],
)

_WORKERS = Row(
    "Workers and schedulers",
    [
        Panel(
            title="Workers by state",
            description="As the schedulers see them. `suspect`: silent, stuck or failing; "
            "the scheduler's log says which (event=worker_suspect).",
            queries=[
                Query("max by (model, state) (rhizome_scheduler_workers{*})", "{{model}} {{state}}")
            ],
        ),
        Panel(
            title="Breakers",
            description="0 closed, 1 half open, 2 open: requests there failed three times in a "
            "row. Read that worker's log.",
            queries=[Query("max by (worker) (rhizome_scheduler_breaker{*})", "{{worker}}")],
            warn=1,
            bad=2,
            most=2,
        ),
        Panel(
            title="Reservations",
            description="Live ones, and those that no load report includes yet. Both 0 when idle.",
            queries=[
                Query("sum(rhizome_scheduler_reservations{*})", "live"),
                Query("sum(rhizome_scheduler_reservations_charged{*})", "charged"),
            ],
        ),
        Panel(
            title="Reservations that leaked or expired",
            description="Leaks are 0 unless there is a bug: please report it with the scheduler's "
            "log. Expired ones were placed and never arrived at their worker.",
            queries=[
                Query("sum(rhizome_scheduler_reservation_leaks{*})", "leaked"),
                Query(_rate("rhizome_scheduler_reservations_expired_total"), "expired a second"),
            ],
            bad=1,
        ),
        Panel(
            title="Leaders",
            description="Schedulers that lead: 1 where they elect one, but for moments.",
            queries=[Query("sum(rhizome_scheduler_leads{*}) or vector(0)", "leaders")],
        ),
        Panel(
            title="Schedulers that answer",
            description="As each gateway sees them. Below the number configured: one is down, or "
            "out of that gateway's reach.",
            queries=[
                Query("min by (instance) (rhizome_gateway_schedulers_answering{*})", "{{instance}}")
            ],
        ),
    ],
)

ROUTING = Dashboard(
    slug="routing",
    title="Rhizome / Routing and cache",
    description="Where requests go and why, what waits, and whether the cache index is right.",
    rows=[_PLACEMENT, _CACHE, _WORKERS],
)
