"""Prometheus metrics over HTTP, on a port of their own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def metrics_server(port: int | None, collector: Collector) -> Iterator[int | None]:
    """Serve `/metrics` until the block ends, on the port it yields; nothing without a port.

    What `collector` gives, and the process's own memory, CPU time and open files. `collector` is asked from a thread of the server's. Raises OSError for a port that cannot be
    bound.
    """
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, registry=registry)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot serve metrics on port {port}: {error}") from error
    logger.info("event=metrics_served port=%s", server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
