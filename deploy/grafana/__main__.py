"""`python -m deploy.grafana [directory]`: write the dashboards where the chart takes them from."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.grafana.generate import write_dashboards

_CHART = Path(__file__).parents[1] / "helm" / "rhizome" / "dashboards"

if __name__ == "__main__":
    write_dashboards(Path(sys.argv[1]) if len(sys.argv) > 1 else _CHART)
