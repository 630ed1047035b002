"""What a dashboard is, as plain data, and how it becomes Grafana's JSON.

In expressions `{*}` stands for the labels that every dashboard selects by, and `{*,a="b"}` adds to
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    common,
    dashboard as grafana,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models, dashboard as models

_SCOPE = 'namespace=~"$namespace",release=~"$release"'
_TAG = "rhizome"
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_ROW_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel. `legend` may name labels in double braces."""

    expr: str
    legend: str
    # Of a histogram whose exemplars name traces.
    exemplars: bool = False

    @property
    def scoped(self) -> str:
        """The expression as Grafana gets it."""
        return self.expr.replace("{*", "{" + _SCOPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. `description` says what to do when it looks wrong."""

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Literal["lines", "stat"] = "lines"
    stacked: bool = False
    # Where it becomes worrying, and where it is bad; below them where `falls`.
    warn: float | None = None
    bad: float | None = None
    falls: bool = False
    most: float | None = None
    decimals: int | None = None
    width: int = 8
    height: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a title."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice above the panels, of a label's values; all of them unless one is picked."""

    name: str
    label: str
    query: str
    # Whether "all" means those of the query, and not whatever has the label.
    only_listed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One page. `slug` names its file and its address."""

    slug: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = field(default_factory=tuple)
    span: str = "now-1h"

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


NAMESPACE = Variable(
    "namespace", "Namespace", "label_values(rhizome_event_loop_lag_seconds_count, namespace)"
)
RELEASE = Variable(
    "release",
    "Release",
    'label_values(rhizome_event_loop_lag_seconds_count{namespace=~"$namespace"}, release)',
)
MODEL = Variable(
    "model", "Model", f"label_values(rhizome_gateway_prompts_total{{{_SCOPE}}}, model)"
)
TENANT = Variable(
    "tenant", "Tenant", f"label_values(rhizome_gateway_prompts_total{{{_SCOPE}}}, tenant)"
)
WORKER = Variable(
    "worker",
    "Worker",
    f'label_values(rhizome_worker_info{{{_SCOPE},model=~"$worker_model"}}, instance)',
    only_listed=True,
)
WORKER_MODEL = Variable(
    "worker_model", "Model", f"label_values(rhizome_worker_info{{{_SCOPE}}}, model)"
)


def quantiles(
    histogram: str, labels: str = "", by: str = "", shares: Sequence[float] = (0.5, 0.95, 0.99)
) -> list[Query]:
    """Lines for quantiles of a histogram, one for each value of the label `by`."""
    grouped = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return [
        Query(
            f"histogram_quantile({share}, sum by ({grouped}) "
            f"(rate({histogram}_bucket{{*{labels}}}[$__rate_interval])))",
            f"{name}p{share * 100:g}",
            exemplars=True,
        )
        for share in shares
    ]


def to_grafana(page: Dashboard) -> Any:
    """The dashboard as Grafana's own model."""
    builder = (
        grafana.Dashboard(page.title)
        .uid(f"rhizome-{page.slug}")
        .description(page.description)
        .tags([_TAG])
        .time(page.span, "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            grafana.DashboardLink("Rhizome")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([_TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            grafana.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for variable in (NAMESPACE, RELEASE, *page.variables):
        builder.with_variable(_variable(variable))
    identifier = 0
    for row in page.rows:
        identifier += 1
        builder.with_row(grafana.Row(row.title).id(identifier))
        for panel in row.panels:
            identifier += 1
            built = _stat(panel) if panel.kind == "stat" else _lines(panel)
            builder.with_panel(_common(built, panel).id(identifier))
    return builder.build()


def _variable(variable: Variable) -> grafana.QueryVariable:
    built = (
        grafana.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(_SOURCE)
        .query(variable.query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )
    return built if variable.only_listed else built.all_value(".*")


def _common(built: Any, panel: Panel) -> Any:
    built = (
        built.title(panel.title)
        .description(panel.description)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .height(panel.height)
        .span(min(panel.width, _ROW_WIDTH))
        .thresholds(_thresholds(panel))
    )
    if panel.most is not None:
        built = built.max(panel.most)
    if panel.decimals is not None:
        built = built.decimals(panel.decimals)
    for number, query in enumerate(panel.queries):
        target = (
            prometheus.Dataquery()
            .expr(query.scoped)
            .legend_format(query.legend)
            .ref_id(chr(ord("A") + number))
            .range()
            .exemplar(query.exemplars)
        )
        built = built.with_target(target)
    return built


def _lines(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(40 if panel.stacked else 5)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if panel.warn is not None or panel.bad is not None:
        lines = common.GraphThresholdsStyleConfig().mode(
            common_models.GraphTresholdsStyleMode.DASHED
        )
        built = built.thresholds_style(lines)
    return built


def _stat(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _thresholds(panel: Panel) -> grafana.ThresholdsConfig:
    if panel.falls:
        colours = [("red", None), ("orange", panel.bad), ("green", panel.warn)]
    else:
        colours = [("green", None), ("orange", panel.warn), ("red", panel.bad)]
    steps = [
        models.Threshold(color=colour, value=value)
        for index, (colour, value) in enumerate(colours)
        if index == 0 or value is not None
    ]
    if panel.warn is None and panel.bad is None:
        steps = [models.Threshold(color="green", value=None)]
    return grafana.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
