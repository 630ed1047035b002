"""The default policy against the best other one, from results of the simulator.

    python -m bench.simulator.judge DIR [--policy prefix_load] [--limit 1.03]

DIR holds the JSON files of `python -m bench.simulator --output DIR`. For each workload and load,
and for the mean and the p99 latency: the policy's mean over the seeds divided by that of the best
other policy, the same ratio with each seed (least to greatest), and how many settings are beyond
the limit. Variants of the same policy (`prefix_load:stall_weight=1`) are not among the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_FIGURES = ("mean_s", "p99_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One setting and figure. Ratios are below 1 where the policy is the better one."""

    workload: str
    load_percent: int
    figure: str
    best_other: str
    ratio: float
    least: float
    greatest: float


def judge(result: dict[str, Any], policy: str) -> list[Verdict]:
    """The verdicts of one workload's result."""
    verdicts = []
    for load in dict.fromkeys(run["load_percent"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["load_percent"] == load]
        own = next(run for run in runs if run["policy"] == policy)
        family = policy.partition(":")[0]
        others = [run for run in runs if run["policy"].partition(":")[0] != family]
        for figure in _FIGURES:
            best = min(others, key=lambda run: float(run[figure]))
            by_seed = [
                mine / other
                for mine, other in zip(own["by_seed"][figure], best["by_seed"][figure], strict=True)
            ]
            verdicts.append(
                Verdict(
                    workload=result["workload"],
                    load_percent=load,
                    figure=figure,
                    best_other=best["policy"],
                    ratio=own[figure] / best[figure],
                    least=min(by_seed),
                    greatest=max(by_seed),
                )
            )
    return verdicts


def table(verdicts: Sequence[Verdict], limit: float) -> str:
    """Markdown: one row a setting, and the sums."""
    lines = ["| workload | load | mean | p99 |", "|---|---|---|---|"]
    for mean, p99 in zip(verdicts[::2], verdicts[1::2], strict=True):
        cells = [
            f"{v.ratio:.3f} ({v.least:.2f} to {v.greatest:.2f}, {v.best_other})"
            + (" **over**" if v.ratio > limit else "")
            for v in (mean, p99)
        ]
        lines.append(f"| {mean.workload} | {mean.load_percent} % | {cells[0]} | {cells[1]} |")
    lines.append("")
    for figure, each in zip(_FIGURES, (verdicts[::2], verdicts[1::2]), strict=True):
        ratios = [verdict.ratio for verdict in each]
        over = sum(ratio > limit for ratio in ratios)
        best = sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"{figure}: {over} of {len(each)} settings over {limit:.2f}, best in {best}, "
            f"mean ratio {fmean(ratios):.3f}, worst {max(ratios):.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or for each of several policies the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--policy", nargs="+", default=["prefix_load"])
    parser.add_argument("--limit", type=float, default=1.03)
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in sorted(args.directory.glob("*.json"))]
    for policy in args.policy:
        verdicts = [verdict for result in results for verdict in judge(result, policy)]
        text = table(verdicts, args.limit)
        print(text if len(args.policy) == 1 else policy + "\n" + "\n".join(text.splitlines()[-2:]))


if __name__ == "__main__":
    main()
