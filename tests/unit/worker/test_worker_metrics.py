"""A worker's metrics are what its engine said last, and what its steps came to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from services.worker.engine.messages import (
    Admission,
    EngineLoad,
    EngineReady,
    Finish,
    SequenceError,
    StepOutput,
    StepWork,
)
from services.worker.engine_link import engine_link
from services.worker.metrics import WorkerCollector
from services.worker.replica import Replica
from services.worker.step_totals import STEP_BOUNDS_S, StepTotals
from tests.fakes.worker_bench import IDENTITY

READY = EngineReady(
    device="cpu",
    dtype="float32",
    attention_backend="torch",
    page_size=16,
    num_pages=100,
    context_length=512,
    vocab_size=1000,
    eos_token_ids=[0],
    max_running_sequences=8,
    max_step_tokens=64,
    pair_work=1e-4,
    tp_size=1,
)


def finish(key: int, reason: str) -> Finish:
    return Finish(key, reason, None, 1, 0, 0, 0, 0, 0, 0)


def metrics_of(replica: Replica) -> Callable[..., float | None]:
    """What a scrape says of a metric and its labels."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(replica))

    def value(name: str, prefix: str = "rhizome_worker_", **labels: str) -> float | None:
        return registry.get_sample_value(f"{prefix}{name}", labels)

    return value


async def test_metrics_are_what_the_engine_said_last() -> None:
    async with engine_link() as link:
        replica = Replica(IDENTITY, link)
        value = metrics_of(replica)
        assert (value("serving"), value("pages")) == (0, 0)
        replica.handle(READY)
        assert (value("serving"), value("pages"), value("free_pages")) == (1, 100, 100)
        what = {"worker": IDENTITY.worker_id, "model": IDENTITY.pool.served_model_name}
        kinds = {"device": "cpu", "dtype": "float32", "attention_backend": "torch"}
        assert value("info", tp_size="1", **what, **kinds) == 1
        load = EngineLoad(
            num_running=3,
            num_waiting=2,
            num_waiting_uncached_tokens=40,
            num_running_context_tokens=90,
            num_free_pages=50,
            num_evictable_pages=20,
            predicted_step_ns=2_000_000,
            num_preemptions=1,
            num_prompt_tokens=300,
            num_cached_tokens=100,
            num_output_tokens=70,
            num_evicted_pages=6,
        )
        replica.handle(StepOutput(step_number=9, load=load))
        assert [
            value(name)
            for name in (
                *("running_sequences", "waiting_sequences", "waiting_uncached_tokens"),
                *("running_context_tokens", "free_pages", "evictable_pages"),
                *("predicted_step_seconds", "preemptions_total", "prompt_tokens_total"),
                *("cached_prompt_tokens_total", "output_tokens_total"),
                *("used_pages", "evicted_pages_total"),
            )
        ] == [3, 2, 40, 90, 50, 20, 0.002, 1, 300, 100, 70, 30, 6]
        replica.drain("stopping")
        assert value("serving") == 0


async def test_steps_and_ends_add_up() -> None:
    async with engine_link() as link:
        replica = Replica(IDENTITY, link)
        value = metrics_of(replica)
        assert value("ended_sequences_total", reason="stop") == 0
        for step_s in (0.0005, 0.001, 0.003, 60.0):
            work = StepWork(step_ns=round(step_s * 1e9), prefill_tokens=10)
            replica.handle(StepOutput(step_number=1, work=work))
        # Says something, but computed nothing.
        replica.handle(StepOutput(step_number=1, finishes=[finish(1, "stop"), finish(2, "length")]))
        replica.handle(StepOutput(step_number=1, errors=[SequenceError(3, 4, "late", 0)]))
        below = {bound: value("step_seconds_bucket", le=str(bound)) for bound in STEP_BOUNDS_S}
        assert (below[0.001], below[0.002], below[0.005], below[5.0]) == (2, 2, 3, 3)
        assert value("step_seconds_bucket", le="+Inf") == value("step_seconds_count") == 4
        assert value("step_seconds_sum") == pytest.approx(60.0045)
        assert value("computed_prefill_tokens_total") == 40
        assert value("ended_sequences_total", reason="stop") == 1
        assert value("ended_sequences_total", reason="length") == 1
        assert value("ended_sequences_total", reason="error") == 1


async def test_sglangs_names_say_the_same_in_tokens() -> None:
    async with engine_link() as link:
        replica = Replica(IDENTITY, link)
        value = metrics_of(replica)
        labels = {
            "prefix": "sglang:",
            "model_name": IDENTITY.pool.served_model_name,
            "engine_type": "unified",
            "tp_rank": "0",
            "pp_rank": "0",
        }
        # Nothing is known of the cache of an engine that loads.
        assert value("token_usage", **labels) is None
        replica.handle(READY)
        load = EngineLoad(
            num_running=6,
            num_waiting=2,
            num_free_pages=50,
            num_evictable_pages=20,
            num_preemptions=1,
            num_prompt_tokens=300,
            num_cached_tokens=100,
            num_evicted_pages=6,
        )
        replica.handle(StepOutput(step_number=9, load=load))
        names = (
            *("num_running_reqs", "num_queue_reqs", "token_usage", "utilization"),
            *("num_used_tokens", "kv_used_tokens", "kv_available_tokens", "kv_evictable_tokens"),
            *("max_total_num_tokens", "page_size", "num_pages", "context_len"),
            *("num_retracted_requests_total", "evicted_tokens_total"),
        )
        assert [value(name, **labels) for name in names] == [
            *(6, 2, 0.3, 0.75, 480, 480, 800, 320, 1600, 16, 100, 512, 1, 96)
        ]
        assert value("cache_hit_rate", **labels) == pytest.approx(1 / 3)
        assert value("cache_config_info", page_size="16", num_pages="100", **labels) == 1


def test_rates_are_of_the_last_seconds_and_waits_and_pauses_are_counted() -> None:
    now_s = 100.0
    totals = StepTotals(clock=lambda: int(now_s * 1e9))

    def step(num_output: int, num_preemptions: int, decodes: int, prefills: int = 0) -> None:
        totals.add(
            StepOutput(
                step_number=1,
                load=EngineLoad(num_output_tokens=num_output, num_preemptions=num_preemptions),
                work=StepWork(
                    step_ns=1000,
                    decode_sequences=decodes,
                    prefill_sequences=prefills,
                    prefill_tokens=100 * prefills,
                ),
                admissions=[Admission(key, 0, 3_000_000_000) for key in range(prefills)],
            )
        )

    step(0, 0, 0, prefills=3)
    assert totals.queue_seconds.total == 9
    assert totals.token_seconds.counts == [0] * len(totals.token_seconds.counts)
    now_s = 100.5
    step(3, 0, 3)
    step(60, 2, 4, prefills=1)
    # Three tokens came after half a second, four at once.
    assert totals.token_seconds.total == pytest.approx(1.5)
    assert sum(totals.token_seconds.counts) == 7
    assert (totals.step_sequences.total, totals.step_tokens.total) == (3 + 3 + 5, 300 + 3 + 104)
    # The second under way is not over yet.
    assert totals.output_rate() == 0
    now_s = 101.0
    assert (totals.output_rate(), totals.num_recent_preemptions()) == (6, 2)
    now_s = 110.9
    assert totals.output_rate() == 6
    now_s = 111.0
    assert (totals.output_rate(), totals.num_recent_preemptions()) == (0, 0)
