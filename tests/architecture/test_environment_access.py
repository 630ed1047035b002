"""The environment is read in one place: the only exception to the linter's ban."""

from __future__ import annotations

from pathlib import Path

_SERVICES = Path(__file__).resolve().parents[2] / "services"


def test_only_the_config_loader_may_read_the_environment() -> None:
    exempt = {
        str(path.relative_to(_SERVICES))
        for path in _SERVICES.rglob("*.py")
        if "noqa: TID251" in path.read_text(encoding="utf-8")
    }
    assert exempt == {"common/config.py"}
