"""From the records of requests to figures, a table and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.bench.figures import Distribution, distribution, median_and_spread, number, table
from services.bench.serving.client import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """One run. Times are of successful requests only; None where there were none."""

    num_succeeded: int
    # Message -> requests that failed with it.
    errors: dict[str, int]
    # Succeeded with another number of tokens than was asked: figures do not compare.
    num_wrong_length: int
    # From the first request sent to the last one's end.
    duration_s: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    # Mean number of requests under way.
    concurrency: float
    # Events with tokens, of a token: below 1, the server merges.
    events_per_token: float
    # Of the prompts' tokens; None where the server does not say.
    cached_share: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    # Between neighbouring events, whatever number of tokens they carry.
    itl_ms: Distribution | None
    e2e_ms: Distribution | None

    @property
    def num_failed(self) -> int:
        """Requests without a whole answer."""
        return sum(self.errors.values())

    def as_json(self) -> dict[str, Any]:
        """Every figure by its name."""
        return {
            name: value.as_json() if isinstance(value, Distribution) else _rounded(value)
            for name in self.__dataclass_fields__
            for value in (getattr(self, name),)
        } | {"num_failed": self.num_failed}


def summarize(records: Sequence[RequestRecord]) -> RunFigures:
    """The figures of one run's records."""
    done = [record for record in records if record.error is None]
    errors = Counter(record.error for record in records if record.error is not None)
    started_s = min((record.start_s for record in done), default=0.0)
    duration_s = max((record.end_s for record in done), default=0.0) - started_s
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    num_output = sum(record.num_output_tokens for record in done)
    num_input = sum(record.num_input_tokens for record in done)
    cached = [record.num_cached_tokens for record in done if record.num_cached_tokens is not None]
    return RunFigures(
        num_succeeded=len(done),
        errors=dict(errors.most_common()),
        num_wrong_length=sum(r.num_output_tokens != r.num_requested_tokens for r in done),
        duration_s=duration_s,
        requests_per_s=len(done) * per_s,
        input_tokens_per_s=num_input * per_s,
        output_tokens_per_s=num_output * per_s,
        concurrency=sum(record.e2e_s for record in done) * per_s,
        events_per_token=sum(len(record.event_s) for record in done) / max(1, num_output),
        cached_share=sum(cached) / max(1, num_input) if cached else None,
        ttft_ms=_milliseconds([record.ttft_s for record in done]),
        tpot_ms=_milliseconds([t for record in done if (t := record.tpot_s) is not None]),
        itl_ms=_milliseconds([gap for record in done for gap in record.gaps_s]),
        e2e_ms=_milliseconds([record.e2e_s for record in done]),
    )


# What reports quote: a figure's name, the field, and the statistic where it is a distribution.
_HEADLINES = (
    ("requests/s", "requests_per_s", None),
    ("output tokens/s", "output_tokens_per_s", None),
    ("input tokens/s", "input_tokens_per_s", None),
    ("mean requests under way", "concurrency", None),
    ("TTFT p50 ms", "ttft_ms", "p50"),
    ("TTFT p99 ms", "ttft_ms", "p99"),
    ("TPOT mean ms", "tpot_ms", "mean"),
    ("TPOT p99 ms", "tpot_ms", "p99"),
    ("ITL p99 ms", "itl_ms", "p99"),
    ("E2E p50 ms", "e2e_ms", "p50"),
)


def headlines(runs: Sequence[RunFigures]) -> dict[str, dict[str, Any]]:
    """Median, spread and every run's value of the figures that reports quote."""
    lines = {}
    for name, field, statistic in _HEADLINES:
        found = [value for run in runs if (value := getattr(run, field)) is not None]
        values = [value if statistic is None else getattr(value, statistic) for value in found]
        if values:
            median, spread = median_and_spread(values)
            lines[name] = {
                "median": round(median, 4),
                "spread": round(spread, 4),
                "runs": [round(value, 4) for value in values],
            }
    return lines


def format_report(title: str, runs: Sequence[RunFigures]) -> str:
    """What is printed: outcome, headlines over all runs, distributions of the median run."""
    parts = [title, _outcome(runs)]
    rows = [
        [name, number(line["median"]), f"{100 * line['spread']:.1f} %", _joined(line["runs"])]
        for name, line in headlines(runs).items()
    ]
    if rows:
        parts.append(table(["figure", "median", "spread", "runs"], rows))
    typical = sorted(runs, key=lambda run: run.duration_s)[(len(runs) - 1) // 2]
    names = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
    times = [
        [name.replace("_", " ").upper().replace("MS", "ms"), *map(number, found.as_json().values())]
        for name in names
        if (found := getattr(typical, name)) is not None
    ]
    if times:
        header = ["time", "mean", "std", "p50", "p90", "p95", "p99"]
        parts.append(table(header, times))
    return "\n\n".join(parts)


def _outcome(runs: Sequence[RunFigures]) -> str:
    succeeded, failed = sum(r.num_succeeded for r in runs), sum(r.num_failed for r in runs)
    lines = [f"succeeded {succeeded}, failed {failed}"]
    wrong = sum(run.num_wrong_length for run in runs)
    if wrong:
        lines.append(f"WARNING: {wrong} answers have another length than was asked")
    errors: Counter[str] = Counter()
    for run in runs:
        errors.update(run.errors)
    lines += [f"  {count} x {message}" for message, count in errors.most_common(5)]
    return "\n".join(lines)


def _joined(values: Sequence[float]) -> str:
    return ", ".join(number(value) for value in values)


def _milliseconds(seconds: Sequence[float]) -> Distribution | None:
    return distribution([1e3 * value for value in seconds])


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
