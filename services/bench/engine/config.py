"""What `rhizome bench latency` and `offline` are asked. The engine's flags are the worker's own."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from services.bench.output import check_output
from services.bench.presets import WorkloadFlags
from services.worker.config import WorkerConfig

# What the worker's front does with its flags; there is no front here.
_FRONT_FLAGS = (
    "served_model_name",
    "listen",
    "advertise_address",
    "scheduler",
    "worker_id",
    "role",
    "label",
    "max_queued_requests",
    "chat_template",
    "drain_timeout_s",
    "parent_pid",
    "profile_dir",
    "metrics_port",
)

_Numbers = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConfig:
    """Time one static batch through the engine alone: no services, no scheduling."""

    batch_size: Annotated[
        tuple[int, ...],
        Parameter(name=["--batch-size", "--batch"], consume_multiple=True, negative=""),
    ] = (1,)
    """Sequences of a batch; each number is measured."""

    input_len: _Numbers = (1024,)
    """Tokens of each prompt; each number is measured with each batch."""

    output_len: _Numbers = (16,)
    """Tokens each sequence generates; each number is measured with each batch."""

    temperature: float = 0.0
    """Of sampling; 0 is greedy."""

    breakdown: bool = False
    """Also say where a decode step's time goes: device busy, host by part, waiting."""

    output_file: Path | None = None
    """Write the figures as JSON here."""

    engine: Annotated[WorkerConfig, Parameter(name="*")] = WorkerConfig()

    def __post_init__(self) -> None:
        _refuse_front_flags(self.engine)
        for name, least in (("batch_size", 1), ("input_len", 1), ("output_len", 2)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name} takes numbers >= {least}, got {values}")
        check_output("output_file", self.output_file)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number >= 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineConfig:
    """Throughput of the engine alone on a serving workload, everything sent at once.

    Arrivals and concurrency of a preset belong to clients, so they do not apply.
    """

    flags: Annotated[WorkloadFlags, Parameter(name="*")] = WorkloadFlags()

    repeat: int = 1
    """Runs, with an emptied prefix cache each; their median and spread are reported."""

    disable_progress: bool = False
    """Draw no progress bar."""

    output_file: Path | None = None
    """Write the figures as JSON here."""

    engine: Annotated[WorkerConfig, Parameter(name="*")] = WorkerConfig()

    def __post_init__(self) -> None:
        _refuse_front_flags(self.engine)
        check_output("output_file", self.output_file)
        if self.repeat < 1:
            raise ValueError(f"repeat must be >= 1, got {self.repeat}")


def _refuse_front_flags(config: WorkerConfig) -> None:
    defaults: dict[str, Any] = {
        field.name: field.default for field in fields(config) if field.default is not MISSING
    }
    for name in _FRONT_FLAGS:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{name} is the worker service's and has no meaning here")
    if config.node_rank > 0:
        raise ValueError("node_rank must be 0: the benchmark is node 0, the others are workers")
