"""Where reports are written."""

from __future__ import annotations

from pathlib import Path


def check_output(name: str, path: Path | None) -> None:
    """Raises ValueError before anything is measured for a report that could not be written."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name}: there is no directory {path.parent}")
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a directory")
