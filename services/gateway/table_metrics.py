"""What the gateway knows of the workers behind it, for those that choose among gateways.

An endpoint picker (Gateway API Inference Extension) reads these and the prompts that wait and run.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.gateway.control_plane import WorkerTable

_PREFIX = "rhizome_gateway"


class TableCollector(Collector):
    """The last worker table, when somebody scrapes: at most about a second old."""

    def __init__(self, table: WorkerTable) -> None:
        self._table = table

    def collect(self) -> Iterator[Metric]:
        used = GaugeMetricFamily(
            f"{_PREFIX}_kv_used_ratio",
            "Share of the workers' pages that running sequences use.",
            labels=("model",),
        )
        # The labels' names are those that endpoint pickers look for.
        info = GaugeMetricFamily(
            f"{_PREFIX}_cache_config_info",
            "Tokens of a page and pages of all workers; always 1.",
            labels=("model", "block_size", "num_gpu_blocks"),
        )
        for model in self._table.models:
            workers = self._table.workers(model.name)
            num_pages = sum(worker.num_pages for worker in workers)
            num_used = sum(worker.num_used_pages for worker in workers)
            used.add_metric((model.name,), num_used / num_pages if num_pages else 0.0)
            page_size = str(model.identity.page_size)
            info.add_metric((model.name, page_size, str(num_pages)), 1)
        yield from (used, info)
