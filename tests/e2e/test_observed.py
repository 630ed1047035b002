"""Prometheus against the real services under load: every dashboard and rule gets its data."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import prometheus, promql
from tests.e2e.observed import Observed, observed_system
from tests.e2e.promql import Asked

pytestmark = [
    pytest.mark.skipif(prometheus.BINARY is None, reason=prometheus.WHY_NOT),
    pytest.mark.timeout(180),
]
# All of it together, from the first scrape on.
_PATIENCE_S = 60.0
# Headings of metrics that this system has no reason to export.
_ELSEWHERE = ("With TLS", "Controller")
_WITH_REDIS = ("_redis_up", "_redis_failures_total", "rhizome_scheduler_leads")


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed_system(tmp_path_factory.mktemp("observed")) as observed:
        yield observed


@pytest.fixture(scope="module")
def deadline(observed: Observed) -> float:
    return time.monotonic() + _PATIENCE_S


def without_data(observed: Observed, asked: list[Asked], deadline: float) -> list[Asked]:
    """Those that have none until then."""
    left = asked
    while True:
        left = [each for each in left if not observed.prometheus.has_data(each.expr)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def test_every_query_of_every_dashboard_has_data(observed: Observed, deadline: float) -> None:
    queries = promql.dashboard_queries()
    assert len(queries) > 80
    assert without_data(observed, queries, deadline) == []


def test_every_variable_of_every_dashboard_has_values(observed: Observed) -> None:
    for variable in promql.dashboard_variables():
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable.expr)
        assert match is not None, variable
        values = observed.prometheus.api(f"label/{match[2]}/values", **{"match[]": match[1]})
        assert values, variable


def test_every_recording_rule_records(observed: Observed, deadline: float) -> None:
    names = [Asked(rule.where, rule.where) for rule in promql.rules("record")]
    assert without_data(observed, names, deadline) == []


def test_no_rule_fails(observed: Observed) -> None:
    groups = observed.prometheus.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(promql.rules("record")) + len(promql.rules("alert"))
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_the_metrics_page_has_what_is_exported_and_nothing_else(observed: Observed) -> None:
    has_redis = shutil.which("redis-server") is not None
    exported: set[str] = set()
    for address in observed.targets.values():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            exported |= promql.exposed(reply.read().decode())
    documented = {
        name
        for name, heading in promql.documented().items()
        if heading not in _ELSEWHERE and (has_redis or not name.endswith(_WITH_REDIS))
    }
    assert exported - documented == set(), "exported, and not in docs/metrics.md"
    assert documented - exported == set(), "in docs/metrics.md, and not exported"


def test_what_sglangs_dashboards_ask_for_has_data(observed: Observed, deadline: float) -> None:
    (model,) = observed.prometheus.api("label/model_name/values")

    def sglang(name: str) -> str:
        # This Prometheus may have it with either (docs/metrics.md says when).
        return f'{{__name__=~"sglang[:_]{name}",model_name="{model}"}}'

    gauges = ("num_running_reqs", "num_queue_reqs", "gen_throughput", "cache_hit_rate")
    histograms = ("time_to_first_token_seconds", "e2e_request_latency_seconds")
    asked = [Asked(name, sglang(name)) for name in gauges]
    for name in (*histograms, "inter_token_latency_seconds", "queue_time_seconds"):
        rates = f"sum by (le) (rate({sglang(f'{name}_bucket')}[10s]))"
        asked.append(Asked(name, f"histogram_quantile(0.99, {rates})"))
        mean = f"rate({sglang(f'{name}_sum')}[10s]) / rate({sglang(f'{name}_count')}[10s])"
        asked.append(Asked(name, f"avg({mean})"))
    assert without_data(observed, asked, deadline) == []


@pytest.mark.parametrize("form", ["sglang:", "sglang_"])
def test_sglangs_names_take_the_form_that_is_wanted(
    form: str, observed: Observed, tmp_path: Path
) -> None:
    """As docs/metrics.md says it: renamed when they are scraped."""
    page = promql.METRICS_PAGE.read_text()
    (relabelling,) = re.findall(r"    metric_relabel_configs:\n(?:    .*\n)+", page)
    relabelling = relabelling.replace("sglang_$1", f"{form}$1")
    worker = {"worker-0": observed.targets["worker-0"]}
    with prometheus.running_prometheus(tmp_path, worker, relabelling=relabelling) as renamed:
        until = time.monotonic() + 30
        while not renamed.has_data(f"{form}num_running_reqs"):
            assert time.monotonic() < until, renamed.log.read_text()
            time.sleep(0.2)
        assert len(renamed.query('{__name__=~"sglang[:_]num_running_reqs"}')) == 1
        assert renamed.has_data("rhizome_worker_serving")
