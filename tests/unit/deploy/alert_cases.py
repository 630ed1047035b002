"""Series under which each alert fires, and under which it must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Values in promtool's notation by metric.
Series = Mapping[str, str]

_CHAT = 'rhizome_gateway_requests_total{endpoint="/v1/chat/completions",status='
_ERRORS = f'{_CHAT}"500"}}'
_FIRST_TOKEN = 'rhizome_gateway_time_to_first_token_seconds_bucket{model="m",le='
_LAG = "rhizome_event_loop_lag_seconds_bucket{le="
_PROMPTS = 'rhizome_gateway_prompts_total{model="m",tenant="t",outcome='
_STATE = 'rhizome_scheduler_workers{model="m",state='
_EXPIRY = 'rhizome_tls_certificate_expiry_timestamp_seconds{certificate="server"}'


@dataclass(frozen=True, slots=True)
class Case:
    """When to look, in steps, and what there is; each of `rests` alone leaves the alert quiet."""

    step: int
    fires: Series
    rests: tuple[Series, ...]
    # Samples and evaluations are so many minutes apart.
    step_minutes: int = 1


def _requests(good: int, bad: int, steps: int) -> Series:
    """So many a step. Neither refusals nor health checks matter."""
    return {
        f'{_CHAT}"200"}}': f"0+{good}x{steps}",
        f'{_CHAT}"429"}}': f"0+{good}x{steps}",
        _ERRORS: f"0+{bad}x{steps}",
        'rhizome_gateway_requests_total{endpoint="/health",status="503"}': f"0+99x{steps}",
    }


def _first_tokens(good: int, slow: int, steps: int) -> Series:
    total = f"0+{good + slow}x{steps}"
    return {
        'rhizome_gateway_time_to_first_token_seconds_count{model="m"}': total,
        f'{_FIRST_TOKEN}"3.0"}}': f"0+{good}x{steps}",
        f'{_FIRST_TOKEN}"6.0"}}': total,
    }


def _lag(bound: str) -> Series:
    """All of it just below one bound."""
    bounds = ("0.01", "0.1", "0.5", "+Inf")
    first = bounds.index(bound)
    return {
        f'{_LAG}"{each}"}}': "0x30" if place < first else "0+240x30"
        for place, each in enumerate(bounds)
    }


def _prompts(ok: int, overloaded: int) -> Series:
    return {f'{_PROMPTS}"ok"}}': f"0+{ok}x30", f'{_PROMPTS}"overloaded"}}': f"0+{overloaded}x30"}


def _preemptions(preempted: int, ended: int) -> Series:
    return {
        "rhizome_worker_preemptions_total": f"0+{preempted}x30",
        'rhizome_worker_ended_sequences_total{reason="stop"}': f"0+{ended}x30",
    }


def _predicted(predicted: int, missing: int) -> Series:
    return {
        "rhizome_scheduler_predicted_cached_tokens_total": f"0+{predicted}x120",
        "rhizome_scheduler_overpredicted_cached_tokens_total": f"0+{missing}x120",
    }


def _leaders(*leads: int, serving: int = 1) -> Series:
    schedulers = {f'rhizome_scheduler_leads{{pod="{i}"}}': f"{x}x30" for i, x in enumerate(leads)}
    return {**schedulers, "rhizome_worker_serving": f"{serving}x30"}


def _values(name: str, fires: str, *rests: str) -> Case:
    """One series alone."""
    return Case(25, {name: fires}, tuple({name: values} for values in rests))


# Long windows need fewer samples.
_HOURS, _DAY, _DAYS = 7 * 12, 25 * 3, 73 * 2

CASES = {
    "RhizomeAvailabilityBurnsFast": Case(
        70,
        _requests(100, 4, 80),
        # Half as many errors; as many, but none in the last five minutes; no requests at all.
        (_requests(100, 2, 80), {**_requests(100, 4, 80), _ERRORS: "0+4x60 240x20"}, {}),
    ),
    "RhizomeAvailabilityBurns": Case(
        _HOURS,
        _requests(100, 2, _HOURS),
        (
            _requests(100, 1, _HOURS),
            {**_requests(100, 2, _HOURS), _ERRORS: f"0+2x{_HOURS - 7} {2 * _HOURS - 14}x7"},
        ),
        step_minutes=5,
    ),
    "RhizomeAvailabilityBurnsSlowly": Case(
        _DAY, _requests(200, 2, _DAY), (_requests(200, 1, _DAY),), step_minutes=20
    ),
    "RhizomeAvailabilityBurnsAway": Case(
        _DAYS, _requests(400, 1, _DAYS), (_requests(600, 1, _DAYS),), step_minutes=30
    ),
    "RhizomeTtftBurnsFast": Case(70, _first_tokens(80, 20, 80), (_first_tokens(90, 10, 80), {})),
    "RhizomeTtftBurns": Case(
        _HOURS, _first_tokens(90, 10, _HOURS), (_first_tokens(95, 5, _HOURS),), step_minutes=5
    ),
    "RhizomeTtftBurnsSlowly": Case(
        _DAY, _first_tokens(95, 5, _DAY), (_first_tokens(98, 2, _DAY),), step_minutes=20
    ),
    "RhizomeTtftBurnsAway": Case(
        _DAYS, _first_tokens(98, 2, _DAYS), (_first_tokens(199, 1, _DAYS),), step_minutes=30
    ),
    # Many wait but no more than before; they become more but are few.
    "RhizomeQueueGrows": _values(
        'rhizome_scheduler_queued_requests{priority="normal"}', "0+5x30", "50x30", "0+0.2x30"
    ),
    "RhizomeSaturated": _values('rhizome_scheduler_saturation{model="m"}', "1.2x30", "0.9x30"),
    "RhizomeSheds": Case(25, _prompts(90, 10), (_prompts(99, 1), _prompts(0, 0))),
    # Many, but far more that ended; few, though as many as ended.
    "RhizomePreemptionStorm": Case(
        25, _preemptions(12, 30), (_preemptions(12, 90), _preemptions(3, 3))
    ),
    "RhizomeNoReadyWorkers": Case(
        5,
        {f'{_STATE}"ready"}}': "0x30"},
        ({f'{_STATE}"ready"}}': "1x30", f'{_STATE}"suspect"}}': "2x30"},),
    ),
    "RhizomeWorkerSuspect": Case(
        10,
        {f'{_STATE}"suspect"}}': "1x30", f'{_STATE}"ready"}}': "3x30"},
        ({f'{_STATE}"suspect"}}': "1x2 0x30"}, {f'{_STATE}"draining"}}': "1x30"}),
    ),
    # It is half open in between; one that was half open once is no more.
    "RhizomeBreakerOpen": _values(
        'rhizome_scheduler_breaker{worker="w"}',
        "2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2",
        "1x30",
        "2x3 0x30",
    ),
    "RhizomeWorkerNotFollowed": _values(
        'rhizome_cache_index_following{worker="w"}', "0x30", "1x30", "1x20 0x3"
    ),
    "RhizomeRequestsMigrate": _values("rhizome_gateway_migrations_total", "0+6x30", "0+1x30"),
    "RhizomeReservationLeak": _values("rhizome_scheduler_reservation_leaks", "1x30", "0x30"),
    # As wrong, but next to nothing was predicted.
    "RhizomeCachePredictionOff": Case(
        100, _predicted(1200, 600), (_predicted(1200, 300), _predicted(60, 60))
    ),
    "RhizomeNoSchedulerAnswers": _values(
        "rhizome_gateway_placed_without_scheduler_total", "0+6x30", "7x30"
    ),
    # One leads; nobody elects one; nobody could lead.
    "RhizomeNoLeader": Case(
        25, _leaders(0, 0), (_leaders(0, 1), _leaders(), _leaders(0, 0, serving=0))
    ),
    "RhizomeTwoLeaders": Case(25, _leaders(1, 1), (_leaders(1, 0),)),
    "RhizomeRedisDown": Case(
        25,
        {"rhizome_gateway_redis_up": "0x30", "rhizome_scheduler_redis_up": "1x30"},
        ({"rhizome_gateway_redis_up": "1x30", "rhizome_scheduler_redis_up": "1x30"}, {}),
    ),
    "RhizomeGroupRestarts": _values(
        'rhizome_controller_gang_restarts_total{group="g"}', "0+0.5x30", "1x30"
    ),
    "RhizomeControllerRefused": _values(
        "rhizome_controller_kubernetes_failures_total", "0+1x30", "9x30"
    ),
    "RhizomeScalesBlindly": _values(
        'rhizome_controller_signals_missing{group="g"}', "1x30", "0x30"
    ),
    "RhizomeEventLoopLag": Case(25, _lag("0.5"), (_lag("0.01"), _lag("0.1"))),
    # Targets of others, which have no release, are theirs.
    "RhizomeTargetDown": Case(25, {"up": "0x30"}, ({"up": "1x30"}, {'up{release=""}': "0x30"})),
    "RhizomeCertificateExpires": _values(_EXPIRY, "600000x30", "700000x30"),
    "RhizomeCertificateExpiresNow": _values(_EXPIRY, "80000x30", "100000x30"),
}
