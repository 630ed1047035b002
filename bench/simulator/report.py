"""Markdown of what the simulator's command stored: gains over round-robin, and every figure.

    python -m bench.simulator.report DIR

Mean / p99 latency in seconds, means over the seeds; the hit rate is that at 70 % load, or at the
first load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DEFAULT, _BASELINE = "prefix_load", "round_robin"
_COMPARED_LOADS = (70, 110)


def gains(results: Sequence[dict[str, Any]]) -> str:
    """Round-robin's latency over the default policy's and E2's."""
    policies = (_DEFAULT, "e2")
    cells = [
        f"{load} %: {policy} {what}"
        for load in _COMPARED_LOADS
        for policy in policies
        for what in ("mean", "p99")
    ]
    lines = ["| workload | " + " | ".join(cells) + " |", "|---" * (1 + len(cells)) + "|"]
    for result in results:
        row = [result["workload"]]
        for load in _COMPARED_LOADS:
            baseline = _run(result, _BASELINE, load)
            for policy in policies:
                own = _run(result, policy, load)
                for figure in ("mean_s", "p99_s"):
                    row.append(f"{baseline[figure] / own[figure]:.2f}x" if baseline and own else "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def figures(result: dict[str, Any]) -> str:
    """One workload: a row a policy, a column a load."""
    loads = list(dict.fromkeys(run["load_percent"] for run in result["runs"]))
    policies = list(dict.fromkeys(run["policy"] for run in result["runs"]))
    hit_load = 70 if 70 in loads else loads[0]
    lines = [
        f"{result['workload']}: {result['num_workers']} workers, "
        f"{result['num_requests']} requests, "
        f"100 % = {result['round_robin_capacity']:.1f} requests/s",
        "",
        "| policy | " + " | ".join(f"{load} %" for load in loads) + " | hit rate |",
        "|---" * (len(loads) + 2) + "|",
    ]
    for policy in policies:
        cells = []
        for load in loads:
            run = _run(result, policy, load)
            cells.append(f"{run['mean_s']:.3f} / {run['p99_s']:.2f}")
        hits = _run(result, policy, hit_load)["hit_rate"]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + f" | {hits:.0%} |")
    return "\n".join(lines)


def _run(result: dict[str, Any], policy: str, load: int) -> dict[str, Any]:
    """The run of that policy at that load; an empty one where there is none."""
    for run in result["runs"]:
        if (run["policy"], run["load_percent"]) == (policy, load):
            return dict(run)
    return {}


def main() -> None:
    """Print the report of one directory."""
    directory = Path(sys.argv[1])
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    print(gains(results))
    for result in results:
        print(f"\n{figures(result)}")


if __name__ == "__main__":
    main()
