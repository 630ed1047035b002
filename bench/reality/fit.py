"""From what real steps took to the simulator's step times, and from probes to its delays.

A log of steps is that of `bench/reality/slowed.py`. Steps that follow each other without a pause
are counted from the end of the one before, so the host's time between steps is part of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import numpy.typing as npt

from bench.simulator.device import StepTimes

# A worker that has work starts its next step within this time.
_PAUSE_NS = 5e6


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a real worker."""

    began_ns: int
    computed_ns: int
    ended_ns: int
    # From the end of the step before, if that was just now.
    lasted_ns: int
    num_decodes: int
    decode_context: int
    num_prefilled: int
    num_pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Step times, and how well they tell the steps that they were fitted on."""

    step_times: StepTimes
    num_steps: int
    # Predicted over actual time of all steps, and the mean relative error of one.
    total_ratio: float
    mean_error: float


def read_steps(logs: Iterable[Path]) -> list[Step]:
    """Steps of all workers, each log in its order."""
    steps: list[Step] = []
    for path in logs:
        last_end = 0
        for line in path.read_text().splitlines():
            began, computed, ended, *work = map(int, line.split())
            start = last_end if began - last_end < _PAUSE_NS else began
            steps.append(Step(began, computed, ended, ended - start, *work))
            last_end = ended
    return steps


def fit_steps(steps: Sequence[Step]) -> Fit:
    """Least squares of relative errors; coefficients that come out negative are left out."""
    rows = np.array([_features(step) for step in steps])
    times = np.array([step.lasted_ns for step in steps], np.float64)
    base, prefill, token, pair, sequence, context = _nonnegative(rows / times[:, None])
    predicted = rows @ np.array([base, prefill, token, pair, sequence, context])
    return Fit(
        step_times=StepTimes(
            prefill_base_ns=base + prefill,
            prefill_token_ns=token,
            prefill_context_ns=pair,
            decode_base_ns=base,
            decode_sequence_ns=sequence,
            decode_context_ns=context,
            shared_reads=None,
        ),
        num_steps=len(steps),
        total_ratio=float(predicted.sum() / times.sum()),
        mean_error=fmean(np.abs(predicted / times - 1)),
    )


def overhead_ns(latencies_s: Sequence[float], steps: Sequence[Step]) -> int:
    """What a request for one token takes beside its step; steps and requests in one order."""
    assert len(latencies_s) == len(steps), "each probe is one step"
    return int(
        median(
            latency * 1e9 - (step.ended_ns - step.began_ns)
            for latency, step in zip(latencies_s, steps, strict=True)
        )
    )


def _features(step: Step) -> tuple[float, ...]:
    return (
        1.0,
        1.0 if step.num_prefilled else 0.0,
        float(step.num_prefilled),
        float(step.num_pairs),
        float(step.num_decodes),
        float(step.decode_context),
    )


def _nonnegative(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The solution of `rows @ x = 1`."""
    scale = np.sqrt((rows**2).sum(axis=0))
    active = [index for index in range(rows.shape[1]) if scale[index] > 0]
    solution = np.zeros(rows.shape[1])
    while active:
        scaled = rows[:, active] / scale[active]
        values = np.linalg.lstsq(scaled, np.ones(len(rows)))[0]
        if values.min() >= 0:
            solution[active] = values / scale[active]
            break
        active.pop(int(np.argmin(values)))
    return solution
