"""Latency against offered load, one line a policy, and how far the seeds are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_PANELS = (("mean_s", "mean latency (s)"), ("p99_s", "p99 latency (s)"), ("hit_rate", "hit rate"))
# The default and the paper's stand out.
_WIDTHS = {"prefix_load": 2.6, "e2": 2.0}


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of one workload's sweep."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    policies = list(dict.fromkeys(run["policy"] for run in result["runs"]))
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for index, policy in enumerate(policies):
            runs = [run for run in result["runs"] if run["policy"] == policy]
            loads = [run["load_percent"] for run in runs]
            axes.fill_between(
                loads,
                [min(run["by_seed"][name]) for run in runs],
                [max(run["by_seed"][name]) for run in runs],
                color=f"C{index % 10}",
                alpha=0.12,
                linewidth=0,
            )
            axes.plot(
                loads,
                [run[name] for run in runs],
                color=f"C{index % 10}",
                linestyle="--" if index >= 10 else "-",
                marker="o",
                markersize=3,
                linewidth=_WIDTHS.get(policy, 1.0),
                label=policy,
            )
        axes.set_xlabel("offered load (% of round-robin's capacity)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if name != "hit_rate":
            axes.set_yscale("log")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle(
        f"{result['workload']}: {result['num_workers']} simulated workers, "
        f"100% = {result['round_robin_capacity']:.1f} requests/s, {len(result['seeds'])} seeds"
        + ("" if result["lose_worker_at"] is None else ", one worker dies on the way")
    )
    figure.savefig(path, dpi=110)
