"""Fits this worker's step times online, so that others can predict them.

Weighted least squares with exponential forgetting (S. Haykin, Adaptive Filter Theory, chapter
"The Method of Least Squares") in the form of decayed normal equations: an observation costs a
few dozen multiplications; the equations are solved only when somebody asks. Observations are
weighted by 1 / time^2, so that relative errors count alike in short and long steps.

Decoding is fitted to the steps that do nothing else, prefilling to what the others take beyond
that. Fitted together, a worker that computes prompts in every step would explain them by its
decoding rows: under a steady load all of that grows and shrinks together.

A few steps do not tell what depends on what: two prompts' times can be explained without any cost a
token, and prompts of one length by their attention alone. So attention to an earlier token is held
within what a model's arithmetic allows, and each solution is drawn to the simplest model that
explains the steps, a time a prefilled token and a time a decode step, with the weight of a quarter
of an observation (ridge regression towards a prior mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.messages import EvictionWork, StepWork

_Floats = npt.NDArray[np.float64]

# What a step's time is a sum of. Attention of prompts is in two of them, tokens that see nothing
# and tokens whose pairs cost as much as they can: any mixture is within bounds.
_PREFILL_ALONE, _TOKENS, _TOKENS_SEEING, _DECODE, _SEQUENCES, _CONTEXT, _BOTH = range(7)
_PREFILLING = [_PREFILL_ALONE, _TOKENS, _TOKENS_SEEING, _BOTH]
_DECODING = [_DECODE, _SEQUENCES, _CONTEXT]
_NUM_FEATURES = 7
# Doing both at once saves reading the weights twice: only this one may be negative.
_NONNEGATIVE = np.arange(_NUM_FEATURES) != _BOTH
# Time of attention over that of products with as much arithmetic: usual, and at most.
_USUAL_PAIR_TIME, _MAX_PAIR_TIME = 2.0, 8.0
_MIN_OBSERVATIONS = 16
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
    """Fitted times of steps.

    `pair_work` is the engine's: the arithmetic of attention to one earlier token over that of one
    token's linear layers.
    """

    def __init__(self, pair_work: float, forgetting: float = 0.999) -> None:
        self._max_pair_share = _MAX_PAIR_TIME * pair_work
        self._decoding = _Equations(forgetting)
        self._prefilling = _Equations(forgetting)
        self._num_observations = 0
        self._recent: CostCoefficients | None = None
        self._recent_until = 0.0

    def observe(self, work: StepWork) -> None:
        """Learn from one step; steps that cannot be told are left out."""
        if work.step_ns <= 0 or not (work.prefill_tokens or work.decode_sequences):
            return
        equations = self._prefilling if work.prefill_tokens else self._decoding
        equations.add(self._features(work), work.step_ns)
        self._num_observations += 1

    def coefficients(self) -> CostCoefficients | None:
        """The fit, no coefficient negative; None until enough steps were seen."""
        if self._num_observations < _MIN_OBSERVATIONS:
            return None
        solved = np.zeros(_NUM_FEATURES)
        if self._decoding.seen:
            self._decoding.solve(solved, _DECODING)
            self._prefilling.solve(solved, _PREFILLING)
        else:
            self._prefilling.solve(solved, _PREFILLING + _DECODING)
        return CostCoefficients(
            prefill_base_ns=float(solved[_PREFILL_ALONE]),
            prefill_token_ns=float(solved[_TOKENS] + solved[_TOKENS_SEEING]),
            prefill_context_ns=float(solved[_TOKENS_SEEING] * self._max_pair_share),
            decode_base_ns=float(solved[_DECODE]),
            decode_sequence_ns=float(solved[_SEQUENCES]),
            decode_context_ns=float(solved[_CONTEXT]),
        )

    def recent(self, now_s: float) -> CostCoefficients | None:
        """A fit that is at most a second old: solving takes longer than a load report."""
        if now_s >= self._recent_until:
            self._recent_until = now_s + _FIT_INTERVAL_S
            self._recent = self.coefficients()
        return self._recent

    def _features(self, work: StepWork) -> tuple[float, ...]:
        prefills, decodes = work.prefill_tokens > 0, work.decode_sequences > 0
        return (
            1.0 if prefills and not decodes else 0.0,
            float(work.prefill_tokens),
            work.prefill_tokens + self._max_pair_share * work.prefill_context_products,
            1.0 if decodes else 0.0,
            float(work.decode_sequences),
            float(work.decode_context_tokens),
            1.0 if prefills and decodes else 0.0,
        )


class _Equations:
    """Decayed normal equations of relative errors."""

    def __init__(self, forgetting: float) -> None:
        self._forgetting = forgetting
        self._products = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        self._targets = [0.0] * _NUM_FEATURES
        # Observations that each feature was in, decayed alike.
        self._counts = [0.0] * _NUM_FEATURES
        self._gain = 1.0

    @property
    def seen(self) -> bool:
        return any(self._counts)

    def add(self, features: Sequence[float], step_ns: int) -> None:
        # Growing the new instead of shrinking the old comes to the same and touches less.
        self._gain /= self._forgetting
        present = [index for index, value in enumerate(features) if value]
        scaled = [value / step_ns for value in features]
        for i in present:
            row, gained = self._products[i], self._gain * scaled[i]
            for j in present:
                row[j] += gained * scaled[j]
            self._targets[i] += gained
            self._counts[i] += self._gain
        if self._gain > _MAX_GAIN:
            self._rescale()

    def solve(self, solution: _Floats, unknown: list[int]) -> None:
        """Find the `unknown` coefficients of `solution`; the others are taken as they are.

        Least squares over the features seen, drawn to the simplest model; what comes out negative
        and must not is left out.
        """
        solution[unknown] = 0.0
        everything = np.array(self._products)
        scale = np.sqrt(np.diag(everything))
        active = [index for index in unknown if scale[index] > 0]
        targets = np.array(self._targets) - everything @ solution
        prior = _prior(everything, targets, active)
        weights = _PRIOR_OBSERVATIONS * self._gain / np.maximum(self._counts, self._gain)
        while active:
            norm = scale[active]
            matrix = everything[np.ix_(active, active)] / np.outer(norm, norm)
            wanted = targets[active] / norm + (weights * prior)[active] * norm
            values = np.linalg.solve(matrix + np.diag(weights[active]), wanted)
            worst = int(np.argmin(np.where(_NONNEGATIVE[active], values, np.inf)))
            if values[worst] >= 0 or not _NONNEGATIVE[active[worst]]:
                solution[active] = values / norm
                break
            active.pop(worst)

    def _rescale(self) -> None:
        self._products = [[value / self._gain for value in row] for row in self._products]
        self._targets = [value / self._gain for value in self._targets]
        self._counts = [value / self._gain for value in self._counts]
        self._gain = 1.0


def _prior(products: _Floats, targets: _Floats, active: list[int]) -> _Floats:
    """The simplest model that fits: a time a prefilled token with its usual pairs, one a decode."""
    seeing = _USUAL_PAIR_TIME / _MAX_PAIR_TIME
    directions = np.zeros((_NUM_FEATURES, 2))
    for feature, direction, share in (
        (_TOKENS, 0, 1 - seeing),
        (_TOKENS_SEEING, 0, seeing),
        (_DECODE, 1, 1.0),
    ):
        if feature in active:
            directions[feature, direction] = share
    squares, wanted = directions.T @ products @ directions, directions.T @ targets
    return np.asarray(directions @ np.maximum(0.0, np.linalg.lstsq(squares, wanted)[0]))
