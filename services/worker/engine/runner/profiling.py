"""Records steps with torch's profiler and writes traces for chrome://tracing and Perfetto."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from services.worker.engine.batch import StepPlan
from services.worker.engine.messages import ProfileState, StartProfile

logger = logging.getLogger(__name__)


class TorchRecorder:
    """At most one recording at a time, of rank 0's host and device; owns its profiler.

    Files are written into `directory` when a recording ends: after its number of steps, or when
    it is stopped. The loop stands still meanwhile. A failure to record is told to who asks next
    and never ends the engine.
    """

    def __init__(self, directory: Path, *, has_gpu: bool) -> None:
        self._directory = directory
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if has_gpu:
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: torch.profiler.profile | None = None
        self._step: torch.profiler.record_function | None = None
        # Steps left to issue; None records until it is stopped.
        self._num_left: int | None = None
        # Of a recording that ended by itself and was not asked for yet.
        self._ended: ProfileState | None = None

    def start(self, message: StartProfile) -> ProfileState:
        """Record the steps that follow. Refused while a recording goes on."""
        if self._profiler is not None:
            return ProfileState(error="a profile is being recorded already", is_refusal=True)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler = torch.profiler.profile(
                activities=self._activities,
                with_stack=message.with_stack,
                record_shapes=message.record_shapes,
            )
            profiler.start()
        except (OSError, RuntimeError) as error:
            logger.exception("event=profile_failed")
            return ProfileState(error=f"the profile could not be started: {error}")
        self._profiler = profiler
        self._num_left = message.num_steps or None
        self._ended = None
        logger.info("event=profile_started steps=%s", self._num_left)
        return ProfileState()

    def begin_step(self, plan: StepPlan) -> None:
        """Open the step's range in the trace."""
        if self._profiler is None:
            return
        self._step = torch.profiler.record_function(
            f"step {plan.step_number}: {len(plan.slots)} rows, {len(plan.token_ids)} tokens"
        )
        self._step.__enter__()  # type: ignore[no-untyped-call]
        if self._num_left is not None:
            self._num_left -= 1

    def end_turn(self) -> None:
        """Close the step's range; end a recording that has all its steps."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if self._profiler is not None and self._num_left == 0:
            self._ended = self._finish(self._profiler)

    def stop(self) -> ProfileState:
        """End the recording, or find it ended, and say where its trace is."""
        if self._profiler is not None:
            return self._finish(self._profiler)
        ended, self._ended = self._ended, None
        return ended or ProfileState(error="no profile is being recorded", is_refusal=True)

    def _finish(self, profiler: torch.profiler.profile) -> ProfileState:
        self._profiler = None
        path = self._directory / f"rhizome-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns()}.json"
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.exception("event=profile_failed")
            return ProfileState(error=f"the profile could not be written: {error}")
        logger.info("event=profile_written path=%s", path)
        return ProfileState(trace_path=str(path))
