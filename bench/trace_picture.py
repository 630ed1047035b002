"""A picture of one chat completion's trace, as a collector gets it from the running services.

    python -m bench.trace_picture docs/images/trace.png [-- flags of rhizome serve]

Starts `rhizome serve` with two replicas and a collector, asks a question whose beginning one of the
replicas has cached, and draws the spans of that request: all of it, and its way to the first token.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

import httpx
import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from tests.e2e.system import System, running_system
from tests.fakes.otlp_collector import CollectedSpan, OtlpCollector, running_collector

matplotlib.use("agg")

_COLORS = {
    "rhizome-gateway": "#4c72b0",
    "rhizome-tokenizer": "#55a868",
    "rhizome-scheduler": "#dd8452",
    "rhizome-cache-index": "#937860",
    "rhizome-worker": "#8172b3",
}
_LAST = "rhizome.worker.v1.WorkerService/Generate"
_CONTEXT = "You answer questions about the sea, in one sentence, and never guess. " * 12
_MAX_TOKENS = 24


def main() -> None:
    flags = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args(sys.argv[1 : len(sys.argv) - len(flags)])
    with (
        running_collector() as collector,
        running_system(
            *("--dp", "2", "--otlp-traces-endpoint", collector.endpoint),
            *("--trace-sample-ratio", "0", *flags),
        ) as system,
    ):
        spans = traced_request(system, collector)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(spans, arguments.picture)


def traced_request(system: System, collector: OtlpCollector) -> list[CollectedSpan]:
    """The spans of one request, after some that warm everything up."""
    for number in range(10):
        ask(system, f"What is wave {number}?", {})
    trace_id = secrets.token_hex(16)
    traceparent = f"00-{trace_id}-{secrets.token_hex(8)}-01"
    ask(system, "What is a tide?", {"traceparent": traceparent})
    return collector.trace(trace_id, _is_whole)


def ask(system: System, question: str, headers: dict[str, str]) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"{_CONTEXT}{question}"}],
        "max_tokens": _MAX_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{system.url}/v1/chat/completions"
    httpx.post(url, json=body, headers=headers, timeout=60).raise_for_status()


def draw(spans: list[CollectedSpan], path: Path) -> None:
    """Two waterfalls with the same rows: all of it, and as far as a little behind the first id."""
    depths = _depths(spans)
    rows = _rows(spans)
    began_ns = min(span.start_ns for span in spans)
    decoding_ns = next(span.start_ns for span in spans if span.name == "decode")
    until_ms = (decoding_ns - began_ns) / 1e6
    figure, (whole, start) = pyplot.subplots(
        1, 2, figsize=(11, 4.4), sharey=True, width_ratios=(2, 3), layout="constrained"
    )
    for axes in (whole, start):
        _waterfall(axes, rows, began_ns)
        axes.set_xlabel("milliseconds")
    start.set_xlim(-0.02 * until_ms, 1.1 * until_ms)
    whole.set_title("one chat completion", fontsize=9)
    start.set_title("its way to the first token", fontsize=9)
    whole.set_yticks(
        range(len(rows)),
        ["    " * depths[span.span_id] + span.name.rpartition(".")[2] for span in rows],
        fontsize=8,
        ha="left",
    )
    whole.tick_params(axis="y", pad=190, length=0)
    whole.invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    names = [name.removeprefix("rhizome-") for name in _COLORS]
    start.legend(handles, names, fontsize=8, loc="lower left", framealpha=1)
    figure.savefig(path, dpi=110)


def _waterfall(axes: Axes, rows: list[CollectedSpan], began_ns: int) -> None:
    for row, span in enumerate(rows):
        left = (span.start_ns - began_ns) / 1e6
        width = (span.end_ns - span.start_ns) / 1e6
        color = _COLORS[span.service]
        axes.barh(row, width, left=left, height=0.62, color=color, edgecolor=color, linewidth=0.8)
        for _, at_ns, _ in span.events:
            axes.plot((at_ns - began_ns) / 1e6, row, "D", color="black", markersize=3.5)
    axes.grid(axis="x", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _rows(spans: list[CollectedSpan]) -> list[CollectedSpan]:
    """Children below their parents, siblings by their start."""
    known = {span.span_id for span in spans}
    rows: list[CollectedSpan] = []

    def add(span: CollectedSpan) -> None:
        rows.append(span)
        for child in sorted(spans, key=lambda child: child.start_ns):
            if child.parent_id == span.span_id:
                add(child)

    for span in spans:
        if span.parent_id not in known:
            add(span)
    return rows


def _depths(spans: list[CollectedSpan]) -> dict[str, int]:
    parents = {span.span_id: span.parent_id for span in spans}

    def depth(span_id: str) -> int:
        return 1 + depth(parents[span_id]) if parents.get(span_id) in parents else 0

    return {span.span_id: depth(span.span_id) for span in spans}


def _is_whole(spans: list[CollectedSpan]) -> bool:
    names = {span.name for span in spans}
    return {"attempt", "match", _LAST, "decode", "POST /v1/chat/completions"} <= names and any(
        name.startswith("rhizome.cache_index") for name in names
    )


if __name__ == "__main__":
    main()
