"""Real runners over tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.worker.engine.batch import Runner
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from tests.fakes.step_driver import StepDriver

PAGE_SIZE = 4


def open_runner(model_path: Path, **changes: Any) -> Runner:
    """A CPU runner with small pages."""
    options: dict[str, Any] = {
        "model_path": model_path,
        "tokenizer_path": model_path,
        "device": "cpu",
        "page_size": PAGE_SIZE,
        "num_pages": 1024,
        "max_running_sequences": 64,
        **changes,
    }
    return build_runner(EngineOptions(**options), lambda fraction, what: None)[0]


def open_driver(model_path: Path, **changes: Any) -> StepDriver:
    """A driver of a CPU runner with small pages."""
    return StepDriver(
        open_runner(model_path, **changes), page_size=changes.get("page_size", PAGE_SIZE)
    )
