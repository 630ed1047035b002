"""Results as madengine reads them: lines of a log, and rows of its perf.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

METRIC = "requests_per_second"

COLUMNS = (
    *("model", "n_gpus", "nnodes", "gpus_per_node", "training_precision", "pipeline", "args"),
    *("tags", "docker_file", "base_docker", "docker_sha", "docker_image", "git_commit"),
    *("machine_name", "deployment_type", "launcher", "gpu_architecture", "performance", "metric"),
    *("relative_change", "status", "build_duration", "test_duration", "dataname"),
    *("data_provider_type", "data_size", "data_download_duration", "build_number"),
    "additional_docker_run_options",
)
# Without these a file is something else.
_NEEDED = ("model", "performance", "metric", "status")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one benchmark of the whole system found."""

    requests_per_s: float
    output_tokens_per_s: float
    # From the first request to the last answer, all runs together.
    duration_s: float


def result_lines(
    measured: Measured, *, model: str, tp_size: int, nnodes: int, num_gpus: int
) -> str:
    """What madengine looks for in a log.

    It adds up the throughput and `local_gpus` of all nodes whose logs have them. These are of the
    whole system, so only one node may print them.
    """
    return "\n".join(
        (
            f"performance: {_number(measured.requests_per_s)} {METRIC}",
            f"tokens_per_second: {_number(measured.output_tokens_per_s)}",
            f"model: {model}",
            f"tp_size: {tp_size}",
            f"nnodes: {nnodes}",
            f"local_gpus: {num_gpus}",
            f"test_duration: {measured.duration_s:.2f}s",
        )
    )


def result_columns(measured: Measured | None) -> dict[str, str]:
    """The columns that say how it went; None for a benchmark without a result."""
    if measured is None:
        return {"metric": METRIC, "status": "FAILURE"}
    return {
        "performance": _number(measured.requests_per_s),
        "metric": METRIC,
        "status": "SUCCESS",
        "test_duration": f"{measured.duration_s:.2f}s",
    }


def check_perf_csv(path: Path) -> None:
    """Raises ValueError for a file that no row could be added to."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"perf-csv: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"perf-csv: {path} cannot be written")
    header = _header(path)
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise ValueError(f"perf-csv: {path} has no column {', '.join(missing)}")


def append_row(path: Path, row: Mapping[str, str]) -> None:
    """Add a row in the file's own order of columns; a new file gets madengine's."""
    header = _header(path)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _header(path: Path) -> list[str]:
    if path.is_dir():
        raise ValueError(f"perf-csv: {path} is a directory")
    if not path.exists() or path.stat().st_size == 0:
        return list(COLUMNS)
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 0.01 else f"{value:.4g}"
