"""What dashboards and rules ask Prometheus: their expressions, and the metrics those name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.e2e.prometheus import LABELS

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "rhizome"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
RULES = sorted((CHART / "rules").glob("*.yaml"))
METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

# Everything that an expression may say beside metrics, labels and numbers.
_WORDS = frozenset(
    "and or unless by on ignoring without group_left group_right offset bool "
    "sum min max avg count topk rate increase deriv histogram_quantile clamp_min clamp_max vector "
    "scalar time max_over_time avg_over_time absent label_replace changes resets".split()
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)")
_MATCHERS = re.compile(r"\{[^}]*\}")
_RANGE = re.compile(r"\[[^\]]*\]")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_NUMBER = re.compile(r"\b[0-9][0-9.]*(?:e-?[0-9]+)?\b")
_BY_NAME = re.compile(r'__name__=~"([^"]*)"')
_DERIVED = ("_bucket", "_sum", "_count", "_created")
# Of Prometheus itself, not of what it scrapes.
BUILT_IN = frozenset({"up", "ALERTS"})


@dataclass(frozen=True, slots=True)
class Asked:
    """One expression, and where it stands."""

    where: str
    expr: str


def dashboard_queries() -> list[Asked]:
    """Every query of every panel, with all variables at All but the scope's."""
    return [
        Asked(f"{path.stem}: {panel['title']}", _filled(target["expr"]))
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]


def dashboard_variables() -> list[Asked]:
    """The selector and label of every variable, as `label of selector`."""
    return [
        Asked(f"{path.stem}: ${variable['name']}", _filled(variable["query"]))
        for path in DASHBOARDS
        for variable in json.loads(path.read_text())["templating"]["list"]
        if variable["type"] == "query"
    ]


def rules(kind: str) -> list[Asked]:
    """The expressions of rules of a kind, "record" or "alert", under their names."""
    return [
        Asked(rule[kind], rule["expr"])
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


def metrics_in(expr: str) -> set[str]:
    """The metrics that an expression names; a word that is none comes with them."""
    named = {name for pattern in _BY_NAME.findall(expr) for name in _alternatives(pattern)}
    for noise in (_STRING, _GROUPING, _MATCHERS, _RANGE, _NUMBER):
        expr = noise.sub(" ", expr)
    return named | {_family(word) for word in _NAME.findall(expr)} - _WORDS


def documented() -> dict[str, str]:
    """The heading under which docs/metrics.md has each metric; tables name them in full."""
    found: dict[str, str] = {}
    heading = ""
    for line in METRICS_PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            for name in re.findall(r"`([a-z0-9_:]+)(?:\{[^}]*\})?`", line.split(" | ")[0]):
                assert name not in found, f"{name} is documented twice"
                found[name] = heading
    return found


def exposed(text: str) -> set[str]:
    """The metrics of an exposition, also those without a sample yet; histograms once."""
    names = re.findall(r"^# TYPE (\S+) \S+$", text, re.MULTILINE)
    # When a counter began; not among what we document.
    return {name for name in names if not name.endswith("_created")}


def _filled(expr: str) -> str:
    for name, value in LABELS.items():
        expr = expr.replace(f"${name}", value)
    expr = expr.replace("$__rate_interval", "10s").replace('$worker"', 'worker-.*"')
    return re.sub(r"\$[a-z_]+", ".*", expr)


def _family(name: str) -> str:
    for end in _DERIVED:
        if name.endswith(end) and not name.startswith("rhizome:"):
            return name.removesuffix(end)
    return name


def _alternatives(pattern: str) -> list[str]:
    match = re.fullmatch(r"([a-z_]*)\(([a-z_|]+)\)([a-z_]*)", pattern)
    assert match is not None, f"cannot tell which metrics {pattern} stands for"
    return [match[1] + middle + match[3] for middle in match[2].split("|")]
