"""Latency against offered load for each policy, in virtual time.

    python -m bench.simulator [--workloads toolbench,videoqa] [--policies prefix_load,e2]
                              [--workers 4] [--requests 800] [--loads 30,50,70,90,110]
                              [--seeds 1,2,3] [--lose-worker-at SHARE] [--schedulers 1]
                              [--jobs 1] [--output DIR]

The real placement, index, batching and radix tree over simulated devices and a virtual clock; open
loop with Poisson arrivals. Loads are percents of what round-robin ends at saturation in the same
setting. Prints one line a run (means over the seeds); writes DIR/<workload>.json and, with
matplotlib, DIR/<workload>.png. `bench.simulator.judge` compares what DIR holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.simulator.sweep import POLICIES, Case, Plan, run_plans
from bench.simulator.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=_workloads, default=tuple(WORKLOADS))
    parser.add_argument(
        "--policies",
        type=_cases,
        default=_cases(",".join(POLICIES)),
        help="names, with other weights: prefix_load:stall_weight=1+prefix_weight=2",
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--loads", type=_numbers, default=(30, 50, 70, 90, 110))
    parser.add_argument("--seeds", type=_numbers, default=(1,))
    parser.add_argument(
        "--lose-worker-at",
        type=float,
        help="the first one dies after this share of the arrivals and never returns",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that run at once")
    parser.add_argument("--schedulers", type=int, default=1, help="asked in turn")
    parser.add_argument("--output", type=Path, help="directory for JSON and PNG files")
    args = parser.parse_args()
    plans = [
        Plan(
            workload=workload,
            cases=args.policies,
            loads=args.loads,
            seeds=args.seeds,
            num_workers=args.workers,
            num_requests=args.requests,
            lose_worker_at=args.lose_worker_at,
            num_schedulers=args.schedulers,
        )
        for workload in args.workloads
    ]
    for result in run_plans(plans, args.jobs, lambda line: print(line, flush=True)):
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            path = args.output / f"{result['workload']}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            _plot(result, path.with_suffix(".png"))


def _plot(result: dict[str, Any], path: Path) -> None:
    try:
        from bench.simulator.plot import plot
    except ImportError:
        print("no plots: matplotlib is not installed (it is in the dev extra)")
        return
    plot(result, path)


def _workloads(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(WORKLOADS)}")
    return names


def _cases(text: str) -> tuple[Case, ...]:
    try:
        return tuple(Case.parse(label) for label in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
