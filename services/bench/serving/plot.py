"""A picture of a benchmark's runs as SVG: how times are distributed, throughput over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from services.bench.serving.client import RequestRecord

_PANEL_WIDTH, _PANEL_HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 34, 44
_TITLE_HEIGHT = 40
_COLOURS = ("#2f6db3", "#c8641e", "#2e8b57", "#8a4fae", "#8c6d1f", "#5b6470")
_INK, _FAINT = "#333333", "#e3e3e3"
# Points of a drawn distribution: more would not be seen.
_MAX_POINTS = 200
_NUM_TIME_BINS = 60
_MILLISECONDS = 1e3

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to 0..1 and knows which to label. Ascending, `low` < `high`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies between the ends."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    x_label: str
    x_axis: Axis
    y_axis: Axis
    # One line a run.
    lines: list[list[Point]]


def draw(title: str, runs: Sequence[Sequence[RequestRecord]]) -> str:
    """The whole picture. Requests that failed are left out."""
    done = [[record for record in records if record.error is None] for records in runs]
    panels = [
        _distribution("Time to first token", [[r.ttft_s for r in run] for run in done]),
        _distribution(
            "Time per output token", [[t for r in run if (t := r.tpot_s)] for run in done]
        ),
        _distribution(
            "Time between events", [[gap for r in run for gap in r.gaps_s] for run in done]
        ),
        _throughput(done),
    ]
    width = 2 * _PANEL_WIDTH
    height = _TITLE_HEIGHT + 2 * _PANEL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="13" font-weight="bold">{escape(title)}</text>',
    ]
    if len(runs) > 1:
        parts += _legend(len(runs), width - _RIGHT)
    for index, panel in enumerate(panels):
        x = index % 2 * _PANEL_WIDTH
        y = _TITLE_HEIGHT + index // 2 * _PANEL_HEIGHT
        parts += [f'<g transform="translate({x},{y})">', *_draw_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def log_axis(values: Sequence[float]) -> Axis:
    """From the least to the greatest value, widened to the next 1, 2 or 5 of their decades."""
    low, high = min(values), max(values)
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high)) + 1
    steps = [step * 10.0**decade for decade in range(first, last) for step in (1, 2, 5)]
    steps.append(10.0**last)
    start = max(index for index, step in enumerate(steps) if step <= low or index == 0)
    end = min(index for index, step in enumerate(steps) if step >= high and index > start)
    ticks = tuple(steps[start : end + 1])
    return Axis(ticks[0], ticks[-1], ticks, is_log=True)


def linear_axis(high: float) -> Axis:
    """From 0 to the next round step above `high`, in four to ten steps."""
    if high <= 0:
        return Axis(0.0, 1.0, (0.0, 1.0))
    raw = high / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * min(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    count = math.ceil(high / step)
    return Axis(0.0, count * step, tuple(index * step for index in range(count + 1)))


def _distribution(title: str, runs: list[list[float]]) -> _Panel:
    """The share of values at or below each, in milliseconds."""
    lines = []
    for values in runs:
        ordered = sorted(value * _MILLISECONDS for value in values if value > 0)
        stride = max(1, len(ordered) // _MAX_POINTS)
        kept = [*range(0, len(ordered), stride), len(ordered) - 1] if ordered else []
        lines.append([(ordered[index], 100 * (index + 1) / len(ordered)) for index in kept])
    points = [x for line in lines for x, _ in line]
    x_axis = log_axis(points) if points else linear_axis(0.0)
    shares = Axis(0.0, 100.0, (0.0, 25.0, 50.0, 75.0, 100.0))
    return _Panel(f"{title}: share of values at or below, %", "ms", x_axis, shares, lines)


def _throughput(runs: list[list[RequestRecord]]) -> _Panel:
    """Output tokens a second in equal parts of the time."""
    lines = []
    for records in runs:
        if not records:
            continue
        start_s = min(record.start_s for record in records)
        width_s = (max(record.end_s for record in records) - start_s) / _NUM_TIME_BINS
        bins = [0.0] * _NUM_TIME_BINS
        for record in records:
            per_event = record.num_output_tokens / max(1, len(record.event_s))
            for event_s in record.event_s:
                place = int((event_s - start_s) / width_s) if width_s else 0
                bins[min(place, _NUM_TIME_BINS - 1)] += per_event
        lines.append(
            [((i + 0.5) * width_s, count / width_s) for i, count in enumerate(bins) if width_s]
        )
    x_axis = linear_axis(max((x for line in lines for x, _ in line), default=0.0))
    y_axis = linear_axis(max((y for line in lines for _, y in line), default=0.0))
    return _Panel("Output tokens a second", "s since the first request", x_axis, y_axis, lines)


def _draw_panel(panel: _Panel) -> list[str]:
    width = _PANEL_WIDTH - _LEFT - _RIGHT
    height = _PANEL_HEIGHT - _TOP - _BOTTOM
    parts = [f'<text x="{_LEFT}" y="{_TOP - 12}" font-weight="bold">{panel.title}</text>']
    for tick in panel.y_axis.ticks:
        y = _TOP + height * (1 - panel.y_axis.place(tick))
        parts.append(_rule(_LEFT, y, _LEFT + width, y))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in panel.x_axis.ticks:
        x = _LEFT + width * panel.x_axis.place(tick)
        parts.append(_rule(x, _TOP, x, _TOP + height))
        label_y = _TOP + height + 15
        parts.append(f'<text x="{x:.1f}" y="{label_y}" text-anchor="middle">{tick:,.6g}</text>')
    parts.append(
        f'<text x="{_LEFT + width / 2:.1f}" y="{_TOP + height + 32}" text-anchor="middle">'
        f"{panel.x_label}</text>"
    )
    for index, line in enumerate(panel.lines):
        points = " ".join(
            f"{_LEFT + width * panel.x_axis.place(x):.1f},"
            f"{_TOP + height * (1 - panel.y_axis.place(y)):.1f}"
            for x, y in line
        )
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6">'
            f"<title>run {index + 1}</title></polyline>"
        )
    return parts


def _legend(num_runs: int, right: float) -> list[str]:
    return [
        f'<text x="{right - 44 * (num_runs - 1 - index):.1f}" y="{_TITLE_HEIGHT}" '
        f'text-anchor="end" fill="{_COLOURS[index % len(_COLOURS)]}">run {index + 1}</text>'
        for index in range(num_runs)
    ]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{_FAINT}" stroke-width="1"/>'
    )
