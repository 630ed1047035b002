import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from services.bench.engine.breakdown import covered
from services.bench.figures import distribution, median_and_spread, percentile, table
from services.bench.serving.client import RequestRecord
from services.bench.serving.plot import draw, linear_axis, log_axis
from services.bench.serving.report import format_report, headlines, summarize

SVG = "{http://www.w3.org/2000/svg}"


def record(start_s=0.0, events=(0.1, 0.2, 0.4), tokens=3, asked=3, error=None, **changes):
    made = RequestRecord(start_s, 10, asked)
    made.event_s = [start_s + event for event in events]
    made.end_s = start_s + (events[-1] if events else 0.0) + 0.01
    made.num_output_tokens = tokens
    made.error = error
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).exponential(size=count).tolist()
    for percent in (0, 1, 50, 90, 95, 99, 100):
        assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent))
    found = distribution(values)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values))
    assert found.p99 == pytest.approx(np.percentile(values, 99))


def test_no_values_have_no_distribution():
    assert distribution([]) is None


def test_the_spread_is_a_share_of_the_median():
    assert median_and_spread([9.0, 10.0, 12.0]) == (10.0, pytest.approx(0.3))
    assert median_and_spread([0.0]) == (0.0, 0.0)


def test_times_of_a_request_follow_its_events():
    made = record(start_s=5.0)
    assert made.ttft_s == pytest.approx(0.1)
    assert made.e2e_s == pytest.approx(0.4)
    assert made.tpot_s == pytest.approx(0.15)
    assert made.gaps_s == pytest.approx([0.1, 0.2])
    assert record(tokens=1).tpot_s is None


def test_rates_are_of_successful_requests_over_their_time():
    run = summarize([record(), record(start_s=1.59), record(error="HTTP 500", events=())])
    assert (run.num_succeeded, run.num_failed, run.errors) == (2, 1, {"HTTP 500": 1})
    assert run.duration_s == pytest.approx(2.0)
    assert run.requests_per_s == pytest.approx(1.0)
    assert run.output_tokens_per_s == pytest.approx(3.0)
    assert run.input_tokens_per_s == pytest.approx(10.0)
    assert run.concurrency == pytest.approx(0.4)


def test_answers_of_another_length_are_counted():
    run = summarize([record(), record(tokens=2), record(asked=9)])
    assert run.num_wrong_length == 2
    assert "2 answers have another length" in format_report("x", [run])


def test_the_share_of_cached_tokens_is_known_where_servers_say_it():
    assert summarize([record()]).cached_share is None
    assert summarize([record(num_cached_tokens=5), record()]).cached_share == 0.25


def test_a_run_in_which_all_fail_still_reports():
    run = summarize([record(error="refused", events=())] * 2)
    text = format_report("server", [run])
    assert "succeeded 0, failed 2" in text
    assert "2 x refused" in text
    assert run.as_json()["ttft_ms"] is None


def test_headlines_hold_median_and_spread_of_all_runs():
    slow = record(events=(0.3, 0.4, 0.6))
    lines = headlines([summarize([record()]), summarize([slow])])
    assert lines["TTFT p50 ms"]["median"] == pytest.approx(200.0)
    assert lines["TTFT p50 ms"]["runs"] == pytest.approx([100.0, 300.0])
    assert lines["TTFT p50 ms"]["spread"] == pytest.approx(1.0)


def test_a_table_aligns_its_columns():
    assert table(["a", "b"], [["long", "1"], ["x", "222"]]).splitlines() == [
        "a       b",
        "----  ---",
        "long    1",
        "x     222",
    ]


def test_a_plot_has_a_line_for_each_run_in_each_panel():
    root = ElementTree.fromstring(draw("a < b", [[record()], [record(start_s=1.0)]]))
    assert len(root.findall(f".//{SVG}polyline")) == 4 * 2
    assert any(text.text == "a < b" for text in root.iter(f"{SVG}text"))


def test_a_plot_of_failures_only_is_empty_but_valid():
    root = ElementTree.fromstring(draw("none", [[record(error="refused", events=())]]))
    points = [line.get("points") for line in root.findall(f".//{SVG}polyline")]
    assert not any(points)


@pytest.mark.parametrize("values", [[3.0], [1.0, 1000.0], [0.021, 0.034], [7.0, 10.0], [0.1, 0.5]])
def test_axes_hold_their_values(values):
    for axis in (log_axis(values), linear_axis(max(values))):
        assert axis.low < axis.high
        assert len(axis.ticks) >= 2
        for value in values:
            assert -1e-9 <= axis.place(value) <= 1 + 1e-9


def test_overlapping_kernels_keep_the_device_busy_once():
    assert covered([(0, 10), (5, 12), (20, 21), (6, 7)]) == 13
    assert covered([]) == 0
