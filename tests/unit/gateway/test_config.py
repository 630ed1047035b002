"""The gateway's flags."""

from __future__ import annotations

import pytest

from services.common.config import parse_config
from services.gateway.config import GatewayConfig

PEERS = ["--schedulers", "a:1", "--schedulers", "b:2", "--tokenizers", "unix:/t"]


def test_peers_are_given_once_for_each_replica() -> None:
    config = parse_config(GatewayConfig, "gateway", [*PEERS, "--port", "0"])
    assert config.schedulers == ("a:1", "b:2")
    assert config.tokenizers == ("unix:/t",)
    assert (config.host, config.port, config.grpc_listen) == ("127.0.0.1", 0, "localhost:30001")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--port", "70000"], "port"),
        (["--keepalive-s", "0"], "keepalive"),
        (["--max-inflight-requests", "0"], "inflight"),
        (["--request-timeout-s", "-1"], "timeout"),
        (["--drain-delay-s", "-1"], "drain-delay"),
        (["--log-level", "loud"], "log-level"),
        (["--tokenizers", "dns+all:t"], "host:port"),
    ],
)
def test_bad_values_are_named(
    flags: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(GatewayConfig, "gateway", [*PEERS, *flags])
    assert caught.value.code == 2
    assert name in capsys.readouterr().err.replace("_", "-")
