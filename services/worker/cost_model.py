"""Fits this worker's step times online, so that others can predict them.

Weighted least squares with exponential forgetting (S. Haykin, Adaptive Filter Theory, chapter
"The Method of Least Squares") in the form of decayed normal equations: an observation costs a
few dozen multiplications; the equations are solved only when somebody asks. Observations are
weighted by 1 / time^2, so that relative errors count alike in short and long steps.

A few steps do not tell what depends on what: two prompts' times can be explained without any cost a
token. So the solution is drawn to the simplest model that explains them, a time a prefilled token
and a time a decode step, with the weight of a quarter of an observation (ridge regression towards a
prior mean).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.messages import EvictionWork, StepWork

_Floats = npt.NDArray[np.float64]

_NUM_FEATURES = 6
_MIN_OBSERVATIONS = 16
# What the simplest model consists of: a time a prefilled token, and a time a decode step.
_ANCHORS = (1, 3)
_PRIOR_OBSERVATIONS = 0.25
_MAX_GAIN = 1e50
_FIT_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CostCoefficients:
    """Nanoseconds, as in scheduler.v1.CostModel."""

    prefill_base_ns: float
    prefill_token_ns: float
    prefill_context_ns: float
    decode_base_ns: float
    decode_sequence_ns: float
    decode_context_ns: float

    def prefill_ns(self, num_tokens: int, num_context: int) -> float:
        """A step that computes `num_tokens`, after at most `num_context` others each."""
        return self.prefill_base_ns + num_tokens * (
            self.prefill_token_ns + self.prefill_context_ns * num_context
        )


def eviction_cost_ns(work: EvictionWork, costs: CostCoefficients) -> list[float]:
    """Prefill time x request share of the next 2^k pages to go (scheduler.v1.LoadReport)."""
    return [
        costs.prefill_token_ns * tokens + costs.prefill_context_ns * pairs
        for tokens, pairs in zip(work.tokens, work.pairs, strict=True)
    ]


class CostModel:
    """The decayed normal equations; coefficients are never negative."""

    def __init__(self, forgetting: float = 0.999) -> None:
        self._forgetting = forgetting
        self._products = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        self._targets = [0.0] * _NUM_FEATURES
        # Observations that each feature was in, decayed alike.
        self._counts = [0.0] * _NUM_FEATURES
        self._gain = 1.0
        self._num_observations = 0
        self._recent: CostCoefficients | None = None
        self._recent_until = 0.0

    def observe(self, work: StepWork) -> None:
        """Learn from one step; steps that cannot be told are left out."""
        if work.step_ns <= 0:
            return
        features = _features(work)
        present = [index for index, value in enumerate(features) if value]
        if not present:
            return
        # Growing the new instead of shrinking the old comes to the same and touches less.
        self._gain /= self._forgetting
        scaled = [value / work.step_ns for value in features]
        for i in present:
            row, gained = self._products[i], self._gain * scaled[i]
            for j in present:
                row[j] += gained * scaled[j]
            self._targets[i] += gained
            self._counts[i] += self._gain
        self._num_observations += 1
        if self._gain > _MAX_GAIN:
            self._rescale()

    def coefficients(self) -> CostCoefficients | None:
        """The fit; None until enough steps were seen."""
        if self._num_observations < _MIN_OBSERVATIONS:
            return None
        solved = _solve_nonnegative(
            np.array(self._products),
            np.array(self._targets),
            _PRIOR_OBSERVATIONS * self._gain / np.maximum(self._counts, self._gain),
        )
        return CostCoefficients(
            prefill_base_ns=solved[0],
            prefill_token_ns=solved[1],
            prefill_context_ns=solved[2],
            decode_base_ns=solved[3],
            decode_sequence_ns=solved[4],
            decode_context_ns=solved[5],
        )

    def recent(self, now_s: float) -> CostCoefficients | None:
        """A fit that is at most a second old: solving takes longer than a load report."""
        if now_s >= self._recent_until:
            self._recent_until = now_s + _FIT_INTERVAL_S
            self._recent = self.coefficients()
        return self._recent

    def _rescale(self) -> None:
        self._products = [[value / self._gain for value in row] for row in self._products]
        self._targets = [value / self._gain for value in self._targets]
        self._counts = [value / self._gain for value in self._counts]
        self._gain = 1.0


def _features(work: StepWork) -> tuple[float, ...]:
    return (
        1.0 if work.prefill_tokens else 0.0,
        float(work.prefill_tokens),
        float(work.prefill_context_products),
        1.0 if work.decode_sequences else 0.0,
        float(work.decode_sequences),
        float(work.decode_context_tokens),
    )


def _solve_nonnegative(products: _Floats, targets: _Floats, prior_weights: _Floats) -> list[float]:
    """Least squares over the features seen, drawn to the solution of the anchors alone.

    `prior_weights` are relative to each feature's own weight. Those that come out negative are left
    out.
    """
    scale = np.sqrt(np.diag(products))
    seen = scale > 0
    anchors = [index for index in _ANCHORS if seen[index]]
    prior = np.zeros(len(scale))
    prior[anchors] = np.maximum(
        0.0, np.linalg.lstsq(products[np.ix_(anchors, anchors)], targets[anchors])[0]
    )
    solution = np.zeros(len(scale))
    active = [index for index in range(len(scale)) if seen[index]]
    while active:
        norm, weights = scale[active], prior_weights[active]
        matrix = products[np.ix_(active, active)] / np.outer(norm, norm) + np.diag(weights)
        wanted = targets[active] / norm + weights * prior[active] * norm
        values = np.linalg.solve(matrix, wanted) / norm
        if values.min() >= 0:
            solution[active] = values
            break
        active.pop(int(np.argmin(values * norm)))
    return [float(value) for value in solution]
