"""The one setting in which real and simulated workers are compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from bench.simulator.device import StepTimes
from bench.simulator.records import Delays
from bench.simulator.run import Setting
from bench.simulator.worker import WorkerShape

_MAX_TOTAL_TOKENS = 16_384
_PAGE_SIZE = 16
_CONTEXT_LENGTH = 4096
_MAX_STEP_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What was fitted, and how the engines were slowed meanwhile."""

    num_workers: ClassVar[int] = 4

    step_times: StepTimes
    # Of a request, beside its steps: gateway, tokenizer, scheduler, calls, and the client.
    overhead_ns: int
    floor_ms: float
    token_ms: float

    @staticmethod
    def flags(policy: str) -> tuple[str, ...]:
        """Of `rhizome serve`."""
        return (
            *("--dp", str(Setup.num_workers), "--policy", policy),
            *("--max-total-tokens", str(_MAX_TOTAL_TOKENS), "--page-size", str(_PAGE_SIZE)),
            *("--context-length", str(_CONTEXT_LENGTH)),
            *("--chunked-prefill-size", str(_MAX_STEP_TOKENS), "--log-level", "warning"),
        )

    def setting(self, workload: str, num_requests: int, seed: int) -> Setting:
        """The same for the simulator."""
        shape = WorkerShape(
            num_pages=_MAX_TOTAL_TOKENS // _PAGE_SIZE,
            page_size=_PAGE_SIZE,
            context_length=_CONTEXT_LENGTH,
            max_step_tokens=_MAX_STEP_TOKENS,
            step_times=self.step_times,
        )
        # What the calls of the default delays take, scaled to what was measured.
        delays = Delays()
        share = self.overhead_ns / (
            2 * delays.schedule + delays.match + delays.submit + delays.output
        )
        delays = replace(
            delays,
            schedule=int(delays.schedule * share),
            match=int(delays.match * share),
            submit=int(delays.submit * share),
            output=int(delays.output * share),
        )
        return Setting(
            workload=workload,
            num_workers=self.num_workers,
            num_requests=num_requests,
            seed=seed,
            shape=shape,
            delays=delays,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Setup:
        """From the file that `fit` wrote."""
        content = json.loads(path.read_text())
        return cls(
            step_times=StepTimes(**content["step_times"]),
            overhead_ns=content["overhead_ns"],
            floor_ms=content["floor_ms"],
            token_ms=content["token_ms"],
        )
