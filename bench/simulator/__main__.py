"""Latency against offered load for each policy, in virtual time.

    python -m bench.simulator [--workloads toolbench,videoqa] [--policies prefix_load,e2]
                              [--workers 4] [--requests 800] [--loads 30,50,70,90,110]
                              [--seeds 1] [--lose-worker-at SECONDS] [--schedulers 1]
                              [--output DIR]

The real placement, index, batching and radix tree over simulated devices and a virtual clock; open
loop with Poisson arrivals. Loads are percents of what round-robin ends at saturation in the same
setting. Prints one line a run; writes DIR/<workload>.json and, with matplotlib, DIR/<workload>.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, get_args

from bench.simulator.records import Loss
from bench.simulator.run import Figures, Setting, capacity, simulate
from bench.simulator.workloads import WORKLOADS
from services.common.policies import PolicyName

_POLICIES = get_args(PolicyName)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=_names(tuple(WORKLOADS)), default=tuple(WORKLOADS))
    parser.add_argument("--policies", type=_names(_POLICIES), default=_POLICIES)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--loads", type=_numbers, default=(30, 50, 70, 90, 110))
    parser.add_argument("--seeds", type=_numbers, default=(1,))
    parser.add_argument("--lose-worker-at", type=float, help="the first one dies and never returns")
    parser.add_argument("--schedulers", type=int, default=1, help="asked in turn")
    parser.add_argument("--output", type=Path, help="directory for JSON and PNG files")
    args = parser.parse_args()
    for workload in args.workloads:
        result = sweep(workload, args)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            path = args.output / f"{workload}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            _plot(result, args.output / f"{workload}.png")


def sweep(workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every policy at every load; figures are medians over the seeds."""
    losses = () if args.lose_worker_at is None else (Loss(args.lose_worker_at, 0),)
    settings = [
        Setting(
            workload=workload,
            num_workers=args.workers,
            num_requests=args.requests,
            seed=seed,
            losses=losses,
            num_schedulers=args.schedulers,
        )
        for seed in args.seeds
    ]
    capacities = [capacity(setting, "round_robin") for setting in settings]
    runs: list[dict[str, Any]] = []
    for load in args.loads:
        for policy in args.policies:
            figures = [
                simulate(setting, policy, rate * load / 100)
                for setting, rate in zip(settings, capacities, strict=True)
            ]
            run = {"policy": policy, "load_percent": load, **_medians(figures)}
            runs.append(run)
            print(
                f"{workload} {load}% {policy}: mean {run['mean_s']:.3f} s, "
                f"p99 {run['p99_s']:.3f} s, hit rate {run['hit_rate']:.3f}",
                flush=True,
            )
    return {
        "workload": workload,
        "num_workers": args.workers,
        "num_requests": args.requests,
        "seeds": list(args.seeds),
        "round_robin_capacity": round(statistics.median(capacities), 3),
        "runs": runs,
    }


def _medians(figures: list[Figures]) -> dict[str, float]:
    rows = [run.as_dict() for run in figures]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _plot(result: dict[str, Any], path: Path) -> None:
    try:
        from bench.simulator.plot import plot
    except ImportError:
        print("no plots: matplotlib is not installed (it is in the dev extra)")
        return
    plot(result, path)


def _names(known: tuple[str, ...]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return chosen

    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
