"""Every policy at every load with every seed: what a run of the simulator's command consists of.

A result is a dictionary that JSON can hold: the setting, and under "runs" one entry for each policy
and load with the figures' means over the seeds, and under "seeds" every seed's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, get_args

from bench.simulator.records import Loss
from bench.simulator.run import Setting, capacity, simulate
from bench.simulator.worker import WorkerShape
from services.common.policies import PolicyName

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True)
class Case:
    """A policy, and weights other than its own; `label` names both.

    As in `prefix_load:stall_weight=1+prefix_weight=2`.
    """

    label: str
    policy: PolicyName
    weights: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, label: str) -> Case:
        """Raises ValueError for an unknown policy or a weight that is no number."""
        given, _, rest = label.partition(":")
        name = next((policy for policy in POLICIES if policy == given), None)
        if name is None:
            raise ValueError(f"{given!r} is not one of {', '.join(POLICIES)}")
        pairs = [pair.partition("=") for pair in rest.split("+")] if rest else []
        return cls(label, name, tuple((weight, float(value)) for weight, _, value in pairs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to run of one workload."""

    workload: str
    cases: tuple[Case, ...]
    loads: tuple[int, ...]
    seeds: tuple[int, ...]
    num_workers: int
    num_requests: int
    # When the first worker dies, as a share of the time in which requests arrive.
    lose_worker_at: float | None = None
    num_schedulers: int = 1
    shape: WorkerShape = WorkerShape()

    def setting(self, seed: int) -> Setting:
        return Setting(
            workload=self.workload,
            num_workers=self.num_workers,
            num_requests=self.num_requests,
            seed=seed,
            shape=self.shape,
            num_schedulers=self.num_schedulers,
        )


@dataclass(frozen=True, slots=True)
class _Job:
    plan: Plan
    seed: int
    load: int
    case: Case
    # Requests a second that are 100 %.
    capacity: float


def run_plans(
    plans: Sequence[Plan], num_processes: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The result of each plan, in order; the runs of all of them share the processes."""
    with get_context("spawn").Pool(num_processes) as pool:
        starts = [(plan, seed) for plan in plans for seed in plan.seeds]
        capacities = dict(zip(starts, pool.map(_capacity, starts, chunksize=1), strict=True))
        jobs = [
            _Job(plan, seed, load, case, capacities[plan, seed])
            for plan in plans
            for load in plan.loads
            for case in plan.cases
            for seed in plan.seeds
        ]
        figures = pool.imap(_figures, jobs, chunksize=1)
        for plan in plans:
            runs = []
            for load in plan.loads:
                for case in plan.cases:
                    run = _summed_up(case, load, [next(figures) for _ in plan.seeds])
                    runs.append(run)
                    say(
                        f"{plan.workload} {load}% {case.label}: mean {run['mean_s']:.3f} s, "
                        f"p99 {run['p99_s']:.3f} s, hit rate {run['hit_rate']:.3f}"
                    )
            rates = [capacities[plan, seed] for seed in plan.seeds]
            yield {
                "workload": plan.workload,
                "num_workers": plan.num_workers,
                "num_requests": plan.num_requests,
                "seeds": list(plan.seeds),
                "lose_worker_at": plan.lose_worker_at,
                "num_schedulers": plan.num_schedulers,
                "round_robin_capacity": round(statistics.fmean(rates), 3),
                "runs": runs,
            }


def _capacity(start: tuple[Plan, int]) -> float:
    plan, seed = start
    return capacity(plan.setting(seed), "round_robin")


def _figures(job: _Job) -> dict[str, float]:
    rate = job.capacity * job.load / 100
    setting = job.plan.setting(job.seed)
    lost_at = job.plan.lose_worker_at
    losses = () if lost_at is None else (Loss(lost_at * setting.num_requests / rate, 0),)
    weights = dict(job.case.weights)
    return simulate(setting, job.case.policy, rate, weights, losses).as_dict()


def _summed_up(case: Case, load: int, figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    means = {name: round(statistics.fmean(f[name] for f in figures), 5) for name in figures[0]}
    by_seed = {name: [f[name] for f in figures] for name in ("mean_s", "p99_s", "hit_rate")}
    return {"policy": case.label, "load_percent": load, **means, "by_seed": by_seed}
