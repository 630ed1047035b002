"""The contracts keep buf's rules and our own about packages and multiplexed streams."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_PROTOS = Path(__file__).resolve().parents[2] / "protos"
_FILES = sorted(_PROTOS.rglob("*.proto"))


def test_buf_lint_is_clean() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "buf", "lint", _PROTOS],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_a_package_imports_only_common(path: Path) -> None:
    own = str(path.parent.relative_to(_PROTOS))
    for imported in re.findall(r'^import "(.+)";', path.read_text(), re.MULTILINE):
        folder = imported.rpartition("/")[0]
        assert folder in (own, "rhizome/common/v1", "google/protobuf"), imported


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_token_ids_are_packed_uint32(path: Path) -> None:
    for kind in re.findall(r"^\s*repeated (\w+) (?:\w+_)?token_ids = ", path.read_text(), re.M):
        assert kind == "uint32"
