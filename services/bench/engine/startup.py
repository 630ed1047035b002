"""Builds the engine that is measured, in this process, and says what it runs on."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from services.bench.progress import ProgressBar
from services.common.config import engine_environment, set_environment
from services.common.logs import configure_logging
from services.worker.config import WorkerConfig
from services.worker.engine.batch import Runner
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner

_PROGRESS_STEPS = 100


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded runner, what was decided for it, and how long that took."""

    runner: Runner
    plan: EnginePlan
    start_s: float


def build_engine(config: WorkerConfig, options: EngineOptions) -> BuiltEngine:
    """Load the model.

    Raises ValueError when the options cannot work, RankLostError when a rank ends.
    """
    configure_logging("bench", "warning" if config.log_level == "info" else config.log_level)
    set_environment(engine_environment(config.kernel_cache_dir))
    bar = ProgressBar("loading", _PROGRESS_STEPS)
    started_s = time.perf_counter()
    runner, plan = build_runner(
        options, lambda fraction, what: bar.update(int(fraction * _PROGRESS_STEPS))
    )
    bar.close()
    return BuiltEngine(runner, plan, time.perf_counter() - started_s)


def describe_engine(engine: BuiltEngine, config: WorkerConfig) -> dict[str, Any]:
    """For reports: the plan, the versions, the device, the command."""
    is_gpu = engine.plan.device == "cuda"
    return {
        "command": "rhizome bench " + " ".join(sys.argv[1:]),
        "model_path": str(config.model_path),
        "load_format": config.load_format,
        "plan": asdict(engine.plan),
        "device": torch.cuda.get_device_name() if is_gpu else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "start_s": round(engine.start_s, 2),
        "unix_s": int(time.time()),
    }
