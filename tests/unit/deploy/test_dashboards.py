"""The dashboards in the chart are those of the code, and each panel can be understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.generate import DASHBOARDS, write_dashboards
from tests.e2e import promql


def panels(path: Path) -> list[dict[str, Any]]:
    everything = json.loads(path.read_text())["panels"]
    return [panel for panel in everything if panel["type"] != "row"]


def test_the_charts_files_are_what_the_code_makes(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_text() for path in promql.DASHBOARDS}
    assert made == shipped, "run `make dashboards`"
    assert len(made) == len(DASHBOARDS) == 5


@pytest.mark.parametrize("path", promql.DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported_and_chosen_from(path: Path) -> None:
    page = json.loads(path.read_text())
    assert page["uid"] == f"rhizome-{path.stem}"
    assert page["links"][0]["tags"] == page["tags"] == ["rhizome"]
    names = [variable["name"] for variable in page["templating"]["list"]]
    assert names[:3] == ["datasource", "namespace", "release"]
    identifiers = [panel["id"] for panel in page["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in panels(path):
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]


@pytest.mark.parametrize("asked", promql.dashboard_queries(), ids=lambda asked: asked.where)
def test_panels_name_metrics_that_there_are(asked: promql.Asked) -> None:
    known = {*promql.documented(), *promql.BUILT_IN}
    known |= {record.where for record in promql.rules("record")}
    assert promql.metrics_in(asked.expr) - known == set()


def test_a_misspelt_metric_is_noticed_wherever_it_stands() -> None:
    for expr in (
        "sum(rate(rhizome_gatewy_requests_total[5m])) or vector(0)",
        'histogram_quantile(0.9, sum by (le) (rate(rhizome_nothing_bucket{a="b"}[5m])))',
        'count({__name__=~"rhizome_(gateway|schedular)_redis_up"})',
        "rhizome:nothing:ratio_rate5m > 2 * (1 - scalar(up))",
    ):
        known = {*promql.documented(), *promql.BUILT_IN}
        assert len(promql.metrics_in(expr) - known) == 1, expr


def test_latency_quantiles_link_to_traces() -> None:
    quantiles = [
        target["exemplar"]
        for path in promql.DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
        if "rhizome_gateway" in target["expr"] and "histogram_quantile" in target["expr"]
    ]
    assert len(quantiles) > 10
    assert all(quantiles)
