"""A release that asks for keys, counts tenants in Redis and limits them, as processes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.live import CHAT, running_release
from tests.cluster.network import missing_rights
from tests.fakes.redis_process import needs_redis

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing_rights()), reason=missing_rights()),
    needs_redis,
]

KEY = "sk-one"
VALUES = {
    "gateway": {"replicas": 1, "apiKeys": [{"name": "one", "key": KEY, "tenant": "acme"}]},
    "tokenizer": {"replicas": 1},
    "scheduler": {"replicas": 1},
    "tenants": {"acme": {"weight": 2}},
    "redis": {"mode": "bundled"},
    "tests": {"apiKeySecret": {"name": "a-key"}},
}


def test_a_release_with_keys_and_redis(control_plane: ControlPlane, tmp_path: Path) -> None:
    with running_release(control_plane, tmp_path, VALUES) as running:
        url = f"{running.url()}/v1/chat/completions"
        assert httpx.post(url, json=CHAT).status_code == 401
        key = {"Authorization": f"Bearer {KEY}"}
        reply = httpx.post(url, json=CHAT, headers=key, timeout=60)
        assert reply.status_code == 200, reply.text
        running.release.kubectl(
            "create", "secret", "generic", "a-key", f"--from-literal=api-key={KEY}"
        )
        status, said = running.kubelet.run_once(running.release.test_pod())
        assert status == 0, said
        assert "rhizome_gateway_redis_up 1.0" in httpx.get(f"{running.url()}/metrics").text
