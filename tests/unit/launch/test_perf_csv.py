"""Results in the forms that madengine reads."""

import csv
import re
from pathlib import Path

import pytest

from services.launch.config import OfflineConfig
from services.launch.offline import check_bench_flags
from services.launch.perf_csv import COLUMNS, Measured, append_row, result_columns, result_lines

MEASURED = Measured(requests_per_s=12.5, output_tokens_per_s=1600.0, duration_s=3.0)
# A number, perhaps in scientific notation, and the figure's name.
PERFORMANCE = re.compile(r"performance:\s+([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s+([^\s,]+)")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_lines_are_those_that_logs_are_searched_for() -> None:
    lines = result_lines(MEASURED, model="m", tp_size=4, nnodes=2, num_gpus=8)
    assert lines.splitlines() == [
        "performance: 12.5000 requests_per_second",
        "tokens_per_second: 1600.0000",
        "model: m",
        "tp_size: 4",
        "nnodes: 2",
        "local_gpus: 8",
        "test_duration: 3.00s",
    ]


@pytest.mark.parametrize("value", [0.0000012, 0.004, 0.5, 12345.678])
def test_figures_of_any_size_are_found_and_not_rounded_to_nothing(value: float) -> None:
    measured = Measured(requests_per_s=value, output_tokens_per_s=1, duration_s=1)
    found = PERFORMANCE.search(result_lines(measured, model="m", tp_size=1, nnodes=1, num_gpus=1))
    assert found is not None
    assert float(found[1]) == pytest.approx(value, rel=0.01)
    assert found[2] == "requests_per_second"


def test_a_new_file_has_every_column_and_results_are_added_to_it(tmp_path: Path) -> None:
    path = tmp_path / "perf.csv"
    append_row(path, {"model": "a, b", **result_columns(MEASURED)})
    append_row(path, {"model": "c", **result_columns(None)})
    first, second = rows(path)
    assert tuple(first) == COLUMNS
    assert (first["model"], first["performance"], first["status"]) == ("a, b", "12.5000", "SUCCESS")
    assert (first["metric"], first["test_duration"]) == ("requests_per_second", "3.00s")
    assert (second["model"], second["performance"], second["status"]) == ("c", "", "FAILURE")


def test_a_file_with_columns_in_another_order_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "perf.csv"
    path.write_text("status,extra,metric,performance,model\n")
    append_row(path, {"model": "m", "nnodes": "2", **result_columns(MEASURED)})
    assert path.read_text().splitlines()[1] == "SUCCESS,,requests_per_second,12.5000,m"


def test_files_that_cannot_take_a_row_are_refused_before_anything_starts(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path, reason in (
        (other, "has no column model, performance, metric, status"),
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "perf.csv", "there is no directory"),
    ):
        with pytest.raises(ValueError, match=reason):
            OfflineConfig(perf_csv=path)


@pytest.mark.parametrize("flag", ["--base-url", "--base-url=http://h", "--output-file"])
def test_what_the_benchmark_is_told_anyway_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match="is given to the benchmark"):
        check_bench_flags(["--preset", "bs1", flag])
