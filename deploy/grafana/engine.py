"""What each worker's engine does with its device."""

from __future__ import annotations

from deploy.grafana.panels import WORKER, WORKER_MODEL, Dashboard, Panel, Query, Row, quantiles

_WORKER = ',instance=~"$worker"'


def _rate(metric: str) -> str:
    return f"rate({metric}{{*{_WORKER}}}[$__rate_interval])"


def _mean(histogram: str) -> str:
    return f"{_rate(f'{histogram}_sum')} / clamp_min({_rate(f'{histogram}_count')}, 1e-9)"


def _gauge(name: str, legend: str = "{{instance}}") -> Query:
    return Query(f"rhizome_worker_{name}{{*{_WORKER}}}", legend)


_LOAD = Row(
    "Load",
    [
        Panel(
            title="Sequences",
            description="Running and waiting, by worker. Waiting with free pages: raise "
            "--max-running-requests. Waiting without: the cache is full (docs/tuning.md).",
            queries=[
                _gauge("running_sequences", "{{instance}} running"),
                _gauge("waiting_sequences", "{{instance}} waiting"),
            ],
        ),
        Panel(
            title="Device busy",
            description="Share of the time in which the device worked on a step. Low while "
            "sequences wait: the host is the limit (docs/tuning.md).",
            queries=[Query(_rate("rhizome_worker_step_seconds_sum"), "{{instance}}")],
            unit="percentunit",
            most=1,
        ),
        Panel(
            title="Tokens a second",
            description="Generated, and computed in prefills.",
            queries=[
                Query(_rate("rhizome_worker_output_tokens_total"), "{{instance}} output"),
                Query(
                    _rate("rhizome_worker_computed_prefill_tokens_total"), "{{instance}} prefill"
                ),
            ],
        ),
        Panel(
            title="Room for sequences",
            description="Running sequences over the most that may run at once. At 100 % others "
            "wait although pages may be free.",
            queries=[
                Query(
                    f"rhizome_worker_running_sequences{{*{_WORKER}}} / "
                    f"clamp_min(rhizome_worker_max_running_sequences{{*{_WORKER}}}, 1)",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
            bad=1,
            most=1,
        ),
        Panel(
            title="Tokens in place and to come",
            description="Context of the running sequences, and tokens of prompts still to be "
            "computed.",
            queries=[
                _gauge("running_context_tokens", "{{instance}} in place"),
                _gauge("waiting_uncached_tokens", "{{instance}} to compute"),
            ],
        ),
        Panel(
            title="Sequences that ended",
            description="By reason. `error` is a refusal by the engine: the worker's log has it.",
            queries=[
                Query(
                    f"sum by (reason) ({_rate('rhizome_worker_ended_sequences_total')})",
                    "{{reason}}",
                )
            ],
            unit="ops",
            stacked=True,
        ),
    ],
)

_CACHE = Row(
    "Cache of keys and values",
    [
        Panel(
            title="Pages by state",
            description="Used by running sequences, cached and evictable, free. All used: "
            "sequences wait or give way; more cache (--kv-cache-dtype, --tp) or fewer sequences.",
            queries=[
                Query(f"sum(rhizome_worker_used_pages{{*{_WORKER}}})", "used"),
                Query(f"sum(rhizome_worker_evictable_pages{{*{_WORKER}}})", "evictable"),
                Query(f"sum(rhizome_worker_free_pages{{*{_WORKER}}})", "free"),
            ],
            stacked=True,
        ),
        Panel(
            title="Cached pages evicted",
            description="Cached prefixes that gave way. Much of it with a low hit rate: the cache "
            "is too small for the prefixes in use.",
            queries=[Query(_rate("rhizome_worker_evicted_pages_total"), "{{instance}}")],
            unit="ops",
        ),
        Panel(
            title="Preemptions",
            description="Sequences that gave way to others for lack of pages; their work is partly "
            "done twice. Steady: lower --max-running-requests.",
            queries=[Query(_rate("rhizome_worker_preemptions_total"), "{{instance}}")],
            unit="ops",
            warn=0.1,
            bad=1,
        ),
    ],
)

_STEPS = Row(
    "Steps",
    [
        Panel(
            title="Step time",
            description="On the device. Long ones carry parts of prompts; --chunked-prefill-size "
            "bounds them.",
            queries=quantiles("rhizome_worker_step_seconds", _WORKER),
            unit="s",
        ),
        Panel(
            title="Time between tokens",
            description="From a sequence's token to its next, as the worker's front gets them. Far "
            "above the step time: the front or the host is the limit.",
            queries=quantiles("rhizome_worker_token_seconds", _WORKER),
            unit="s",
        ),
        Panel(
            title="Wait in the worker",
            description="From a sequence's arrival until it began to run. A worker takes what it "
            "can start in about 200 ms; the rest waits in the scheduler.",
            queries=quantiles("rhizome_worker_queue_seconds", _WORKER),
            unit="s",
        ),
        Panel(
            title="Sequences in a step",
            description="Mean. Larger batches give more tokens a second and a longer step.",
            queries=[Query(_mean("rhizome_worker_step_sequences"), "{{instance}}")],
        ),
        Panel(
            title="Tokens in a step",
            description="Mean of what a step computes, prompts included.",
            queries=[Query(_mean("rhizome_worker_step_tokens"), "{{instance}}")],
        ),
        Panel(
            title="Predicted step",
            description="The moving mean that schedulers get; a step of five times as long makes "
            "the worker suspect.",
            queries=[_gauge("predicted_step_seconds")],
            unit="s",
        ),
    ],
)

_PROCESS = Row(
    "Processes",
    [
        Panel(
            title="Memory of the engine and the front",
            description="Of the host, not the device. The front's grows with unsent output.",
            queries=[
                _gauge("engine_process_resident_memory_bytes", "{{instance}} engine"),
                Query(f"process_resident_memory_bytes{{*{_WORKER}}}", "{{instance}} front"),
            ],
            unit="bytes",
        ),
        Panel(
            title="CPU of the engine and the front",
            description="An engine at 1 core is as fast as its host lets it: give it a core of its "
            "own.",
            queries=[
                Query(
                    _rate("rhizome_worker_engine_process_cpu_seconds_total"), "{{instance}} engine"
                ),
                Query(_rate("process_cpu_seconds_total"), "{{instance}} front"),
            ],
        ),
        Panel(
            title="Event-loop lag of the front, p99",
            description="Above 10 ms tokens leave late: give the worker's front CPU.",
            queries=quantiles(
                "rhizome_event_loop_lag_seconds", _WORKER, by="instance", shares=(0.99,)
            ),
            unit="s",
            warn=0.01,
            bad=0.1,
        ),
    ],
)

ENGINE = Dashboard(
    slug="engine",
    title="Rhizome / Engine",
    description="What each worker's engine does: load, cache, steps.",
    rows=[_LOAD, _CACHE, _STEPS, _PROCESS],
    variables=[WORKER_MODEL, WORKER],
)
