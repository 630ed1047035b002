"""Real figures beside simulated ones of the same arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from bench.reality.setup import Setup
from bench.simulator.run import simulate

_FIGURES = ("mean_s", "p99_s", "hit_rate")
_LIMIT = 0.15
_NUM_RUNS = 9
_BASELINE = "round_robin"


def compare(setup: Setup, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run: both systems' figures, and those of the policy over round-robin's."""
    rows = []
    for run in runs:
        simulated = _simulated(setup, run)
        rows.append(
            {
                **{key: run[key] for key in ("workload", "load_percent", "policy", "late")},
                "real": {name: run[name] for name in _FIGURES},
                "simulated": {name: median(each[name] for each in simulated) for name in _FIGURES},
                "simulated_range": {
                    name: (
                        min(each[name] for each in simulated),
                        max(each[name] for each in simulated),
                    )
                    for name in _FIGURES
                },
            }
        )
    for row in rows:
        baseline = next(
            (
                other
                for other in rows
                if other["policy"] == _BASELINE
                and all(other[key] == row[key] for key in ("workload", "load_percent"))
            ),
            None,
        )
        if baseline is not None and row is not baseline:
            row["over_baseline"] = {
                side: {name: row[side][name] / baseline[side][name] for name in _FIGURES[:2]}
                for side in ("real", "simulated")
            }
    return rows


def _simulated(setup: Setup, run: dict[str, Any]) -> list[dict[str, float]]:
    """Several runs that differ in their delays only, by up to a fifth.

    Queues near saturation answer to milliseconds: a request that comes to another worker changes
    what comes after it. One run says little of a p99; the median of several does.
    """
    figures = []
    for index in range(_NUM_RUNS):
        factor = 0.8 + 0.4 * index / (_NUM_RUNS - 1)
        delayed = replace(setup, overhead_ns=int(setup.overhead_ns * factor))
        setting = delayed.setting(run["workload"], run["num_requests"], run["seed"])
        figures.append(simulate(setting, run["policy"], run["rate"]).as_dict())
    return figures


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table, real / simulated with the simulator's error, and how many are within the limit."""
    lines = [
        "| workload | load | policy | mean s | p99 s | hit rate | mean over round-robin's | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[float]] = {}
    for row in rows:
        cells = [
            _cell(errors, name, row["real"][name], row["simulated"][name]) for name in _FIGURES
        ]
        over = row.get("over_baseline")
        for name in _FIGURES[:2]:
            cells.append(
                ""
                if over is None
                else _cell(errors, f"{name} ratio", over["real"][name], over["simulated"][name])
            )
        lines.append(
            f"| {row['workload']} | {row['load_percent']} % | {row['policy']} | "
            + " | ".join(cells)
            + " |"
        )
    lines.append("")
    for name, values in errors.items():
        within = sum(abs(value) <= _LIMIT for value in values)
        worst = max(values, key=abs)
        lines.append(f"{name}: {within} of {len(values)} within {_LIMIT:.0%}, worst {worst:+.0%}")
    return "\n".join(lines)


def _cell(errors: dict[str, list[float]], name: str, real: float, simulated: float) -> str:
    if real == simulated:
        error = 0.0
    elif real == 0:
        error = float("inf")
    else:
        error = simulated / real - 1
    errors.setdefault(name, []).append(error)
    return f"{real:.3f} / {simulated:.3f} ({error:+.0%})"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG: one row of panels a workload, real as points, simulated as lines."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(13, 3.6 * len(workloads)), layout="constrained")
    panels = figure.subplots(len(workloads), len(_FIGURES), squeeze=False)
    for panel_row, workload in zip(panels, workloads, strict=True):
        for axes, name in zip(panel_row, _FIGURES, strict=True):
            for index, policy in enumerate(policies):
                chosen = [
                    row for row in rows if (row["workload"], row["policy"]) == (workload, policy)
                ]
                if not chosen:
                    continue
                loads = [row["load_percent"] for row in chosen]
                color = f"C{index}"
                simulated = [row["simulated"][name] for row in chosen]
                real = [row["real"][name] for row in chosen]
                ranges = [row["simulated_range"][name] for row in chosen]
                axes.fill_between(loads, *zip(*ranges, strict=True), color=color, alpha=0.12)
                axes.plot(loads, simulated, color=color, label=f"{policy}, simulated")
                axes.plot(loads, real, "o", color=color, label=f"{policy}, real")
            axes.set_title(f"{workload}: {name}", fontsize=9)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("offered load (% of round-robin's simulated capacity)")
    figure.savefig(path, dpi=110)
