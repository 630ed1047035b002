"""The services by the names of their components, and their configurations."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

from tests.chart.rendering import CHART


def _make_schema() -> ModuleType:
    """The script, which is no part of a package."""
    path = CHART.parent / "make_schema.py"
    spec = importlib.util.spec_from_file_location("make_schema", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_schema = _make_schema()

# Component: service, as in the names of its package and of its variables.
SERVICES = {name.replace("_", "-"): name for name in make_schema.CONFIGS}


def config_type(service: str) -> type[Any]:
    return make_schema.config_type(service)  # type: ignore[no-any-return]


def config_fields(service: str) -> set[str]:
    return {field.name for field in make_schema.config_fields(config_type(service))}
