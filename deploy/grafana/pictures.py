"""Each dashboard as a picture: its panels' queries, asked of a Prometheus and plotted.

Not Grafana's own rendering; it shows what the panels are about, for the documentation.
"""

from __future__ import annotations

import io
import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from deploy.grafana.generate import DASHBOARDS
from deploy.grafana.panels import Dashboard, Panel, Query

_COLUMNS = 3
_WIDTH_IN, _ROW_IN, _TOP_IN, _TITLE_IN, _DPI = 13.0, 2.0, 1.0, 0.5, 72
_MOST_LINES = 8
_COLOURS = 32
_STEP_S = 3
_RATE_INTERVAL = "15s"


def draw_dashboards(prometheus: str, directory: Path, start_s: float, end_s: float) -> None:
    """Write dashboard-<slug>.png for each, of that stretch of time."""
    directory.mkdir(parents=True, exist_ok=True)
    for page in DASHBOARDS:
        picture = _Picture(prometheus, start_s, end_s).draw(page)
        picture.save(directory / f"dashboard-{page.slug}.png", optimize=True)


class _Picture:
    """Draws one dashboard."""

    def __init__(self, prometheus: str, start_s: float, end_s: float) -> None:
        self._prometheus = prometheus
        self._start_s = start_s
        self._end_s = end_s

    def draw(self, page: Dashboard) -> Image.Image:
        numbers = [panel for panel in page.panels if panel.kind == "stat"]
        lines = [panel for panel in page.panels if panel.kind == "lines"]
        rows = math.ceil(len(lines) / _COLUMNS)
        top_in = _TOP_IN if numbers else _TITLE_IN
        height_in = _ROW_IN * rows + top_in
        figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI)
        figure.text(0.01, 1 - 0.25 / height_in, page.title, fontsize=13)
        for place, panel in enumerate(numbers):
            x = (place + 0.5) / len(numbers)
            title, value = self._number(panel)
            figure.text(x, 1 - 0.5 / height_in, title, ha="center", fontsize=8, color="0.35")
            figure.text(x, 1 - 0.8 / height_in, value, ha="center", fontsize=14)
        axes = figure.subplots(rows, _COLUMNS, squeeze=False)
        edges = {"left": 0.04, "right": 0.99, "hspace": 0.35, "wspace": 0.15}
        top = 1 - (top_in + 0.1) / height_in
        figure.subplots_adjust(top=top, bottom=0.3 / height_in, **edges)
        for place, axis in enumerate(axes.flat):
            if place < len(lines):
                self._lines(axis, lines[place])
            else:
                axis.axis("off")
        written = io.BytesIO()
        figure.savefig(written)
        return Image.open(written).convert("RGB").quantize(_COLOURS)

    def _number(self, panel: Panel) -> tuple[str, str]:
        series = self._ask(panel.queries[0])
        value = next((each["values"][-1][1] for each in series), "nan")
        return panel.title, _formatted(float(value), panel.unit)

    def _lines(self, axis: Axes, panel: Panel) -> None:
        plotted = []
        for query in panel.queries:
            for series in self._ask(query):
                times = [float(time) - self._start_s for time, _ in series["values"]]
                values = [float(value) for _, value in series["values"]]
                plotted.append((_legend(query.legend, series["metric"]), times, values))
        for name, times, values in plotted:
            label = name if len(plotted) <= _MOST_LINES else None
            axis.plot(times, values, linewidth=1, label=label)
        for bound, colour in ((panel.warn, "tab:orange"), (panel.bad, "tab:red")):
            if bound is not None and axis.get_ylim()[1] * 1.5 > bound:
                axis.axhline(bound, linewidth=0.8, linestyle="--", color=colour)
        axis.set_title(panel.title, fontsize=8, loc="left")
        axis.set_xlim(0, self._end_s - self._start_s)
        # Room for the legend above the lines.
        axis.set_ylim(bottom=0, top=1.3 * axis.get_ylim()[1])
        axis.tick_params(labelsize=6)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _formatted(y, panel.unit)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s"))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0] and len(plotted) <= _MOST_LINES:
            axis.legend(fontsize=5.5, loc="upper left", framealpha=0.6, ncols=4)

    def _ask(self, query: Query) -> list[dict[str, Any]]:
        expr = query.scoped.replace("$__rate_interval", _RATE_INTERVAL)
        expr = expr.replace('$worker"', 'worker-.*"')
        parameters = {
            "query": re.sub(r"\$[a-z_]+", ".*", expr),
            "start": self._start_s,
            "end": self._end_s,
            "step": _STEP_S,
        }
        url = f"{self._prometheus}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as reply:
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return found


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template).strip()


def _formatted(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.4g}".rstrip() if math.isnan(value) else f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if unit == "s" else f"{value:.4g}"
