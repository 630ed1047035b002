"""Runs of the simulator and what they are summed up to."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

from bench.simulator.cluster import Cluster
from bench.simulator.records import Delays, Loss, Served
from bench.simulator.worker import WorkerShape
from bench.simulator.workloads import make_workload
from services.common.policies import PolicyName

# Requests that arrive first find empty caches; they are served, but not measured.
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One workload on one cluster; policies and rates vary within it."""

    workload: str
    num_workers: int
    num_requests: int
    seed: int = 1
    shape: WorkerShape = WorkerShape()
    delays: Delays = Delays()
    # Asked in turn, as by gateways that prefer different ones.
    num_schedulers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What one run came to. Times in seconds, of the requests after the warm-up."""

    num_requests: int
    num_served: int
    mean_s: float
    p50_s: float
    p99_s: float
    mean_first_token_s: float
    p99_first_token_s: float
    mean_queued_s: float
    hit_rate: float
    predicted_hit_rate: float
    throughput: float
    migrations: int
    # The busiest worker's share of the requests over an equal one.
    imbalance: float

    def as_dict(self) -> dict[str, float]:
        return {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def simulate(
    setting: Setting,
    policy: PolicyName,
    rate: float,
    weights: dict[str, float] | None = None,
    losses: tuple[Loss, ...] = (),
) -> Figures:
    """Open loop: `rate` requests a second arrive, whatever becomes of them."""
    workload = make_workload(setting.workload, setting.num_requests, setting.seed)
    cluster = Cluster(
        setting.num_workers,
        policy,
        shape=setting.shape,
        delays=setting.delays,
        seed=setting.seed,
        weights=weights,
        num_schedulers=setting.num_schedulers,
    )
    arrivals_ns = workload.arrivals_ns(rate, setting.seed + 2)
    served = cluster.serve(workload, arrivals_ns, losses)
    return figures(served, setting.num_workers)


def figures(served: list[Served], num_workers: int) -> Figures:
    """Sums up one run."""
    by_arrival = sorted(served, key=lambda request: request.arrived_s)
    measured = by_arrival[int(len(served) * _WARM_UP_SHARE) :]
    latencies = sorted(request.latency_s for request in measured)
    first_tokens = sorted(request.first_token_s for request in measured)
    prompt_tokens = sum(request.prompt_tokens for request in measured)
    ends = sorted(request.arrived_s + request.latency_s for request in served)
    counts: dict[str, int] = {}
    for request in measured:
        counts[request.worker_id] = counts.get(request.worker_id, 0) + 1
    return Figures(
        num_requests=len(measured),
        num_served=len(served),
        mean_s=statistics.fmean(latencies),
        p50_s=percentile(latencies, 50),
        p99_s=percentile(latencies, 99),
        mean_first_token_s=statistics.fmean(first_tokens),
        p99_first_token_s=percentile(first_tokens, 99),
        mean_queued_s=statistics.fmean(request.queued_s for request in measured),
        hit_rate=sum(request.cached_tokens for request in measured) / prompt_tokens,
        predicted_hit_rate=sum(request.predicted_tokens for request in measured) / prompt_tokens,
        throughput=len(served) / ends[-1],
        migrations=sum(request.num_attempts - 1 for request in served),
        imbalance=max(counts.values()) * num_workers / len(measured),
    )


def capacity(setting: Setting, policy: PolicyName) -> float:
    """Requests a second that the cluster ends while more wait than it can take.

    Everything arrives within a second; counted up to the time when nine tenths have ended, so
    that the last ones, which leave workers idle, do not count.
    """
    workload = make_workload(setting.workload, setting.num_requests, setting.seed)
    cluster = Cluster(
        setting.num_workers,
        policy,
        shape=setting.shape,
        delays=setting.delays,
        seed=setting.seed,
    )
    arrivals_ns = workload.arrivals_ns(float(setting.num_requests), setting.seed + 2)
    served = cluster.serve(workload, arrivals_ns)
    ends = sorted(request.arrived_s + request.latency_s for request in served)
    num_counted = int(len(ends) * 0.9)
    return num_counted / ends[num_counted - 1]


def percentile(ordered: list[float], percent: float) -> float:
    """Nearest rank of ascending values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
