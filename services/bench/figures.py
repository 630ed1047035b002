"""Statistics of measured times and how they are printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, standard deviation (of the population) and percentiles, all in one unit."""

    mean: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float

    def as_json(self) -> dict[str, float]:
        """Rounded to what a measurement of milliseconds means."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def distribution(values: Sequence[float]) -> Distribution | None:
    """None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    return Distribution(
        statistics.fmean(ordered),
        statistics.pstdev(ordered),
        *(percentile(ordered, percent) for percent in PERCENTILES),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By linear interpolation between neighbours, as numpy's default; `ordered` ascends."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance from the least to the greatest as a share of it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median if median else 0.0


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is aligned left, the others right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    texts = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append("  ".join(cells).rstrip())
    texts.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(texts)


def number(value: float | None) -> str:
    """Three to five significant digits; a dash for None."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
