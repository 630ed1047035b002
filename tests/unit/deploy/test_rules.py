"""Each alert fires when it should and only then, and says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.e2e import promql
from tests.unit.deploy.alert_cases import CASES, Case, Series

PAGE = Path(__file__).parents[3] / "docs" / "alerts.md"
# What the chart's monitors and Prometheus add to every series.
TARGET = 'namespace="n",release="r",instance="i",job="j"'
GROUPS = [group for path in promql.RULES for group in yaml.safe_load(path.read_text())["groups"]]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool (Debian: apt-get install prometheus)"
)


def promtool(*arguments: str) -> None:
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def labelled(name: str) -> str:
    """With the target's labels, but for those it has itself."""
    metric, _, own = name.rstrip("}").partition("{")
    names = set(re.findall(r"(\w+)=", own))
    added = [label for label in TARGET.split(",") if label.split("=")[0] not in names]
    return f"{metric}{{{','.join([*filter(None, [own]), *added])}}}"


def probe(alert: str, case: Case, series: Series, num_firing: int) -> dict[str, object]:
    """A test of promtool's: how many of the alert fire then."""
    counted = {
        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
        "eval_time": f"{case.step * case.step_minutes}m",
        "exp_samples": [{"labels": "{}", "value": num_firing}],
    }
    return {
        "interval": f"{case.step_minutes}m",
        "input_series": [
            {"series": labelled(name), "values": values} for name, values in series.items()
        ],
        "promql_expr_test": [counted],
    }


def test_every_alert_has_its_case() -> None:
    assert set(CASES) == set(ALERTS)


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    tests = [probe(alert, case, case.fires, 1)]
    tests += [probe(alert, case, series, 0) for series in case.rests]
    # The alert and what it reads, in this order; all rules would take ten times as long.
    read = [rule for rule in RULES if rule.get("record", "no record") in ALERTS[alert]["expr"]]
    rules = tmp_path / "rules.yaml"
    group = {"name": "tested", "rules": [*read, ALERTS[alert]]}
    rules.write_text(yaml.safe_dump({"groups": [group]}))
    file = tmp_path / "test.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(rules)],
                "evaluation_interval": f"{case.step_minutes}m",
                "tests": tests,
            }
        )
    )
    promtool("test", "rules", str(file))


@needs_promtool
def test_prometheus_reads_all_rules() -> None:
    names = [group["name"] for group in GROUPS]
    assert len(set(names)) == len(names), "one PrometheusRule has all groups"
    promtool("check", "rules", *map(str, promql.RULES))


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_section_that_says_what_to_do(alert: str) -> None:
    match = re.search(rf"^## {alert}\n\n(.+?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert match is not None, f"docs/alerts.md has no section {alert}"
    assert "Do:" in match[1]
    rule = ALERTS[alert]
    assert rule["annotations"]["runbook"] == f"docs/alerts.md#{alert.lower()}"
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_no_section_is_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## (Rhizome\w+)$", PAGE.read_text(), re.M)) == set(ALERTS)


@pytest.mark.parametrize("rule", [*promql.rules("record"), *promql.rules("alert")])
def test_rules_name_metrics_that_there_are(rule: promql.Asked) -> None:
    known = {*promql.documented(), *promql.BUILT_IN}
    known |= {record.where for record in promql.rules("record")}
    assert promql.metrics_in(rule.expr) - known == set()
