"""The config loader: flags over environment over defaults, and one line for what is wrong."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.config import (
    child_environment,
    engine_environment,
    parse_config,
    set_default_environment,
)

# cyclopts parses dataclasses otherwise where pydantic is loaded, as it is beside the openai client.
importlib.import_module("pydantic")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllDefaults:
    """A service whose fields all have defaults."""

    page_size: int = 16
    """Tokens a page."""
    peers: tuple[str, ...] = ()
    """Others."""

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"page_size must be >= 1, got {self.page_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Required:
    """A service with a field that must be given."""

    name: str
    """Who it is."""
    port: int = 1
    """Where it is."""


def test_defaults_hold_without_flags() -> None:
    assert parse_config(AllDefaults, "worker", []) == AllDefaults()


def test_a_flag_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHIZOME__WORKER__PAGE_SIZE", "32")
    assert parse_config(AllDefaults, "worker", []).page_size == 32
    assert parse_config(AllDefaults, "worker", ["--page-size", "64"]).page_size == 64


def test_a_kubernetes_service_variable_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHIZOME_WORKER_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("RHIZOME_WORKER_PAGE_SIZE", "99")
    assert parse_config(AllDefaults, "worker", []).page_size == 16


def test_a_repeated_flag_makes_a_tuple() -> None:
    config = parse_config(AllDefaults, "worker", ["--peers", "a", "--peers", "b"])
    assert config.peers == ("a", "b")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--page-sise", "16"], "--page-sise"),
        (["--page-size", "many"], "--page-size"),
        (["--page-size", "0"], "page_size must be >= 1"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(AllDefaults, "worker", argv)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert named in captured.out + captured.err


def test_a_missing_required_field_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(Required, "worker", ["--port", "2"])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert "--name" in captured.out + captured.err


def test_help_shows_each_field_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(Required, "worker", ["--help"])
    assert exit_.value.code == 0
    assert "Who it is." in capsys.readouterr().out


def test_a_child_inherits_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    environment = child_environment({"ADDED": "2"})
    assert environment["KEPT"] == "1"
    assert environment["ADDED"] == "2"


def test_defaults_of_the_environment_leave_alone_what_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RHIZOME_TEST_SET", "operator")
    monkeypatch.setenv("RHIZOME_TEST_OPEN", "")
    monkeypatch.delenv("RHIZOME_TEST_OPEN")
    set_default_environment({"RHIZOME_TEST_SET": "default", "RHIZOME_TEST_OPEN": "default"})
    environment = child_environment({})
    assert environment["RHIZOME_TEST_SET"] == "operator"
    assert environment["RHIZOME_TEST_OPEN"] == "default"


def test_compiled_kernels_go_where_the_operator_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_BLAS_PREFER_CUBLASLT", raising=False)
    anywhere = engine_environment(None)
    assert anywhere == {"TORCH_BLAS_PREFER_CUBLASLT": "1"}
    places = engine_environment(tmp_path)
    for name in anywhere:
        places.pop(name)
    assert set(places) == {
        "TRITON_CACHE_DIR",
        "FLASHINFER_WORKSPACE_BASE",
        "TORCHINDUCTOR_CACHE_DIR",
    }
    assert all(Path(place).is_relative_to(tmp_path) for place in places.values())
    monkeypatch.setenv("TORCH_BLAS_PREFER_CUBLASLT", "0")
    assert engine_environment(None) == {"TORCH_BLAS_PREFER_CUBLASLT": "0"}
