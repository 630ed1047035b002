"""All dashboards, and their JSON as files."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.engine import ENGINE
from deploy.grafana.overview import OVERVIEW
from deploy.grafana.panels import Dashboard, to_grafana
from deploy.grafana.routing import ROUTING
from deploy.grafana.slo import SLO
from deploy.grafana.tenants import TENANTS

DASHBOARDS = (OVERVIEW, ROUTING, ENGINE, TENANTS, SLO)


def dashboard_json(page: Dashboard) -> str:
    """As Grafana's provisioning and import read it."""
    return JSONEncoder(sort_keys=True, indent=1).encode(to_grafana(page)) + "\n"


def write_dashboards(directory: Path) -> None:
    """One file for each, named by its slug."""
    directory.mkdir(parents=True, exist_ok=True)
    for page in DASHBOARDS:
        (directory / f"{page.slug}.json").write_text(dashboard_json(page), encoding="utf-8")
