"""Imports point the way the architecture says, and light services stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_BIN = Path(sys.executable).parent
_SERVICES = sorted(
    path.parent.name for path in (_ROOT / "services").glob("*/__main__.py") if path.is_file()
)
_HEAVY = ("torch", "transformers", "triton", "flashinfer")
# These may never load torch, whatever they do.
_LIGHT = ("gateway", "tokenizer", "scheduler", "cache_index", "controller")

_IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_import_contracts_are_kept() -> None:
    result = subprocess.run(
        [_BIN / "lint-imports", "--no-cache"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


def test_every_service_can_be_started_as_a_module() -> None:
    folders = {path.parent.name for path in (_ROOT / "services").glob("*/main.py")}
    assert folders == set(_SERVICES)


@pytest.mark.parametrize("service", _SERVICES)
def test_help_exits_0_without_loading_a_model_library(service: str) -> None:
    result = _python("-X", "importtime", "-m", f"services.{service}", "--help")
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "services.common" in loaded, "the trace of imports was read"
    assert not loaded.intersection(_HEAVY)


@pytest.mark.parametrize("package", ["rhizome", *(f"services.{name}" for name in _LIGHT)])
def test_no_module_of_a_light_service_loads_torch(package: str) -> None:
    if not any((_ROOT / package.replace(".", "/")).glob("*.py")):
        pytest.skip(f"{package} is not there")
    result = _python("-c", _IMPORT_EVERYTHING, package)
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert package in loaded
    assert not loaded.intersection(("torch", "triton", "flashinfer"))


def test_the_public_package_loads_no_service() -> None:
    result = _python("-c", _IMPORT_EVERYTHING, "rhizome")
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert not [name for name in loaded if name.partition(".")[0] == "services"]


def test_stubs_import_under_their_proto_package_names() -> None:
    result = _python("-c", _IMPORT_EVERYTHING, "rhizome")
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    for proto in (_ROOT / "protos").rglob("*.proto"):
        module = ".".join(proto.relative_to(_ROOT / "protos").with_suffix("").parts)
        assert f"{module}_pb2" in loaded
