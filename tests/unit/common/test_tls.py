"""The flags of TLS between services."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from services.cache_index.config import CacheIndexConfig
from services.common.config import parse_config
from services.common.tls import TlsFlags
from services.gateway.config import GatewayConfig
from services.scheduler.config import SchedulerConfig
from services.tokenizer.config import TokenizerConfig
from services.worker.config import WorkerConfig

FILES = {"tls_cert_file": Path("c"), "tls_key_file": Path("k"), "tls_ca_file": Path("a")}


def test_three_files_or_none_are_taken() -> None:
    assert TlsFlags().files is None
    assert TlsFlags(**FILES).files == (Path("c"), Path("k"), Path("a"))


@pytest.mark.parametrize(
    "names", [some for count in (1, 2) for some in itertools.combinations(FILES, count)]
)
def test_one_or_two_files_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="give all or none"):
        TlsFlags(**{name: FILES[name] for name in names})


def test_a_name_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="tls_server_name means nothing"):
        TlsFlags(tls_server_name="rhizome")


@pytest.mark.parametrize(
    ("service", "config", "required"),
    [
        ("gateway", GatewayConfig, ["--schedulers", "s", "--tokenizers", "t"]),
        ("tokenizer", TokenizerConfig, []),
        ("scheduler", SchedulerConfig, []),
        ("cache_index", CacheIndexConfig, []),
        ("worker", WorkerConfig, []),
    ],
)
def test_every_service_takes_them_as_flags_and_from_the_environment(
    service: str,
    config: Any,
    required: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*required, "--tls-cert-file", "c", "--tls-key-file", "k", "--health-port", "7"]
    with pytest.raises(SystemExit) as refused:
        parse_config(config, service, given)
    assert refused.value.code == 2
    assert "give all or none" in capsys.readouterr().err
    monkeypatch.setenv(f"RHIZOME__{service.upper()}__TLS_CA_FILE", "a")
    parsed = parse_config(config, service, given)
    assert parsed.tls == TlsFlags(**FILES)
    assert parsed.health_port == 7
