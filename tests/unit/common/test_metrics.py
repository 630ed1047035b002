"""Metrics over HTTP: served while the block lasts, on the port that was asked."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.common.metrics import metrics_server


def counted() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("apples", "Apples.", registry=registry).inc(3)
    return registry


def test_metrics_are_served_over_http_and_stop_with_the_block() -> None:
    with metrics_server(0, counted()) as port:
        with urllib.request.urlopen(f"http://localhost:{port}/metrics") as response:
            text = response.read()
    assert b"apples_total 3.0" in text
    assert b"process_resident_memory_bytes" in text
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://localhost:{port}/metrics")


def test_without_a_port_nothing_is_served() -> None:
    with metrics_server(None, counted()) as port:
        assert port is None


def test_a_port_that_cannot_be_bound_is_named() -> None:
    with metrics_server(0, counted()) as taken:
        for port in (taken, 70_000):
            with pytest.raises(OSError, match=f"metrics on port {port}"):
                with metrics_server(port, counted()):
                    pass
