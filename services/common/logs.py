"""Log lines: one event each, `key=value`, on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(service: str, level: str = "info") -> None:
    """Send every logger of this process to standard error, marked with the service's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname).1s {service} %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
