"""The store without a Redis: it fails, but not again and again."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import CollectorRegistry

from services.common.redis_url import check_redis_url
from services.common.shared_store import SharedStore, StoreDownError


class Clock:
    """Time that passes when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_other_urls_are_refused_without_showing_them() -> None:
    for url in (None, "redis://host:1/0", "rediss://:secret@host", "unix:///run/redis.sock"):
        check_redis_url(url)
    with pytest.raises(ValueError, match="redis_url must begin with") as caught:
        check_redis_url("http://user:secret@host")
    assert "secret" not in str(caught.value)


async def test_a_failure_is_logged_once_and_closes_the_store_for_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, registry = Clock(), CollectorRegistry()
    store = SharedStore("redis://127.0.0.1:1", registry, "test", retry_s=1.0, clock=clock)

    def failures() -> float | None:
        return registry.get_sample_value("test_redis_failures_total")

    with caplog.at_level(logging.INFO):
        for moment, asked in ((0.0, 1), (0.9, 1), (1.1, 2), (2.0, 2), (2.2, 3)):
            clock.now = moment
            with pytest.raises(StoreDownError):
                await store.execute(("PING",))
            assert failures() == asked
    assert [record.message.split()[0] for record in caplog.records] == ["event=redis_down"]
    assert registry.get_sample_value("test_redis_up") == 0
    await store.aclose()
