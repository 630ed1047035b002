"""The simulator against reality: real services and workers with the built-in model on CPUs.

    python -m bench.reality fit DIR [--floor-ms 60] [--token-ms 1] [--requests 120] [--rate 3]
    python -m bench.reality run DIR [--policies prefix_load,e2,round_robin] [--loads 50,80,95]
                                    [--workloads small_zipf,small_turns] [--requests 160] [--seed 1]
    python -m bench.reality compare DIR

`fit` runs a trace without any sharing through 4 real workers and fits the simulator's step times to
their steps. `run` sends other traces, at percents of the capacity that the simulator then has with
round-robin, under each policy; its rows replace those of the same policy, workload and load. A run
in which the machine was too busy for the steps is repeated once. `compare` simulates the same
arrivals and prints both beside each other. Steps are drawn out (`bench/reality/slowed.py`) so that
2 cores carry 4 workers. DIR gets fit.json, runs.json, comparison.json, comparison.png and the logs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench.reality.client import Client, model_ids
from bench.reality.compare import compare, markdown, plot
from bench.reality.fit import Step, fit_steps, overhead_ns, read_steps
from bench.reality.setup import Setup
from bench.reality.slowed import Slowing
from bench.reality.system import running_system
from bench.record import commit, machine
from bench.simulator.run import capacity, figures
from bench.simulator.workloads import Segment, make_workload

_FIT_WORKLOAD = "small_random"
_FIT_SEED = 101
_NUM_PROBES = 25
_PROBE_LEN = 40
# A run is repeated when its steps were late by more than this share of their time.
_MOST_LATE = 0.01
_MAX_TRIES = 2


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    fit = parts.add_parser("fit")
    fit.add_argument("--floor-ms", type=float, default=60.0)
    fit.add_argument("--token-ms", type=float, default=1.0)
    fit.add_argument("--requests", type=int, default=120)
    fit.add_argument("--rate", type=float, default=3.0)
    run = parts.add_parser("run")
    run.add_argument("--policies", type=_names, default=("prefix_load", "e2", "round_robin"))
    run.add_argument("--workloads", type=_names, default=("small_zipf", "small_turns"))
    run.add_argument("--loads", type=_names, default=("50", "80", "95"))
    run.add_argument("--requests", type=int, default=160)
    run.add_argument("--seed", type=int, default=1)
    compared = parts.add_parser("compare")
    for part in (fit, run, compared):
        part.add_argument("directory", type=Path)
        part.add_argument("--port", type=int, default=31870)
    args = parser.parse_args()
    if args.part == "fit":
        asyncio.run(_fit(args))
    elif args.part == "run":
        asyncio.run(_run(args))
    else:
        _compare(args.directory)


async def _fit(args: argparse.Namespace) -> None:
    args.directory.mkdir(parents=True, exist_ok=True)
    slowing = Slowing(
        floor_ms=args.floor_ms, token_ms=args.token_ms, log=args.directory / "log-fit"
    )
    workload = make_workload(_FIT_WORKLOAD, args.requests, _FIT_SEED)
    async with running_system(slowing, args.port, *Setup.flags("round_robin")) as url:
        client = Client(url)
        probes = [Segment(10**9 + i, _PROBE_LEN) for i in range(_NUM_PROBES)]
        latencies = [await client.probe(model_ids(probe)) for probe in probes]
        probed = sorted(_steps(slowing), key=lambda step: step.began_ns)
        await client.replay(workload, workload.arrivals_ns(args.rate, _FIT_SEED + 2))
        await client.close()
    fitted = fit_steps(_steps(slowing))
    setup = Setup(
        step_times=fitted.step_times,
        overhead_ns=overhead_ns(latencies, probed[-_NUM_PROBES:]),
        floor_ms=args.floor_ms,
        token_ms=args.token_ms,
    )
    report = {
        **setup.as_dict(),
        **_provenance(),
        "num_steps": fitted.num_steps,
        "total_ratio": fitted.total_ratio,
        "mean_error": fitted.mean_error,
        "late": _late(slowing),
    }
    _write(args.directory / "fit.json", report)
    print(json.dumps(report, indent=1))


async def _run(args: argparse.Namespace) -> None:
    setup = Setup.read(args.directory / "fit.json")
    rates = {
        name: capacity(setup.setting(name, args.requests, args.seed), "round_robin")
        for name in args.workloads
    }
    path = args.directory / "runs.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for policy, name, load in product(args.policies, args.workloads, map(int, args.loads)):
        trace = Trace(
            workload=name,
            num_requests=args.requests,
            seed=args.seed,
            load_percent=load,
            rate=rates[name] * load / 100,
        )
        run = {"policy": policy, **await _undisturbed(policy, trace, setup, args)}
        runs = [other for other in runs if not _same_row(other, run)] + [run]
        _write(path, {**_provenance(), "runs": runs})
        print(f"{name} {load}% {policy}: {_short(run)}", flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What one run sends."""

    workload: str
    num_requests: int
    seed: int
    load_percent: int
    rate: float


async def _undisturbed(
    policy: str, trace: Trace, setup: Setup, args: argparse.Namespace
) -> dict[str, Any]:
    """One run; repeated while the machine was too busy, of which the least disturbed counts.

    Each has a system of its own: schedulers remember what they placed in the last minutes.
    """
    runs: list[dict[str, Any]] = []
    workload = make_workload(trace.workload, trace.num_requests, trace.seed)
    while len(runs) < _MAX_TRIES and all(run["late"] > _MOST_LATE for run in runs):
        log = args.directory / f"log-{policy}-{time.time_ns()}"
        slowing = Slowing(floor_ms=setup.floor_ms, token_ms=setup.token_ms, log=log)
        async with running_system(slowing, args.port, *Setup.flags(policy)) as url:
            client = Client(url)
            served = await client.replay(workload, workload.arrivals_ns(trace.rate, trace.seed + 2))
            await client.close()
        summed_up = figures(served, Setup.num_workers).as_dict()
        runs.append(
            {
                **asdict(trace),
                **{key: summed_up[key] for key in ("mean_s", "p50_s", "p99_s", "hit_rate")},
                "late": _late(slowing),
                "num_tries": len(runs) + 1,
                "latencies_s": [round(request.latency_s, 4) for request in served],
            }
        )
    return min(runs, key=lambda run: float(run["late"]))


def _same_row(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("policy", "workload", "load_percent"))


def _compare(directory: Path) -> None:
    setup = Setup.read(directory / "fit.json")
    rows = compare(setup, json.loads((directory / "runs.json").read_text())["runs"])
    _write(directory / "comparison.json", {**_provenance(), "rows": rows})
    plot(rows, directory / "comparison.png")
    print(markdown(rows))


def _steps(slowing: Slowing) -> list[Step]:
    return read_steps(sorted(slowing.log.glob("steps-*.txt")))


def _late(slowing: Slowing) -> float:
    """The share of steps' time by which they were computed later than they were to end."""
    steps = _steps(slowing)
    late_ns = 0.0
    for step in steps:
        least_ns = slowing.least_ns(step.num_decodes + step.num_prefilled)
        late_ns += max(0.0, step.computed_ns - step.began_ns - least_ns)
    return round(late_ns / sum(step.ended_ns - step.began_ns for step in steps), 4)


def _short(run: dict[str, Any]) -> str:
    return (
        f"mean {run['mean_s']:.3f} s, p99 {run['p99_s']:.3f} s, hits {run['hit_rate']:.3f}, "
        f"late {run['late']:.2%}"
    )


def _provenance() -> dict[str, str]:
    return {
        "command": shlex.join(["python", "-m", "bench.reality", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
