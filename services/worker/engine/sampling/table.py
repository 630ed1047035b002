"""Sampling parameters by slot, and the selection of them that one step needs.

Parameters stay on the host, in arrays over slots; a step's rows are gathered there, and only
what some row uses is uploaded.

Shapes: R rows of the step that sample, X those of them that draw noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling.counts import PenaltyRows, TokenCounts
from services.worker.engine.sampling.filters import FilterRows
from services.worker.engine.sampling.philox import Int64Array, UInt64Array

# Below this, temperature means greedy: dividing by less would overflow.
SMALLEST_TEMPERATURE = 1e-5
_SEED_MASK = 2**64 - 1

_SLOT_FIELDS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("seed", np.uint64),
        ("choice", np.int64),
        # Sampling at a position before this one may not end the sequence.
        ("first_stop_position", np.int64),
        ("is_random", np.bool_),
        ("is_filtered", np.bool_),
        ("is_penalised", np.bool_),
        ("is_biased", np.bool_),
        ("wants_logprobs", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseRows:
    """The rows that draw noise: X of the step's R."""

    # [X] rows of the logits; None when it is all of them, in order.
    rows: torch.Tensor | None
    # [X, 1] float32
    temperature: torch.Tensor
    seeds: UInt64Array
    choices: Int64Array
    positions: Int64Array
    # Of the X rows; None when no row filters.
    filters: FilterRows | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasEntries:
    """Values to add to single logits."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """How a step's rows sample; None where no row has the feature."""

    noise: NoiseRows | None
    penalties: PenaltyRows | None
    bias: BiasEntries | None
    # Rows and specs of those that report log-probabilities.
    logprob_rows: list[int]
    logprob_specs: list[LogprobSpec]


class SamplingTable:
    """Owns the sampling parameters of every slot."""

    def __init__(
        self,
        *,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        counts: TokenCounts,
        device: torch.device,
    ) -> None:
        self._slots = np.zeros(num_slots, _SLOT_FIELDS)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._counts = counts
        self._device = device
        self._bias: dict[int, tuple[tuple[int, float], ...]] = {}
        self._stops: dict[int, tuple[int, ...]] = {}
        self._specs: dict[int, LogprobSpec] = {}

    def assign(self, assignment: SlotAssignment) -> None:
        """A slot changes hands."""
        slot, params = assignment.slot, assignment.sampling
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        is_filtered = top_k < self._vocab_size or params.top_p < 1 or params.min_p > 0
        is_penalised = has_penalty(params)
        self._slots[slot] = (
            params.temperature,
            top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            params.seed & _SEED_MASK,
            assignment.choice_index,
            assignment.prompt_len + params.min_new_tokens,
            params.temperature >= SMALLEST_TEMPERATURE,
            is_filtered,
            is_penalised,
            bool(params.logit_bias),
            assignment.logprobs.output,
        )
        self._bias[slot] = params.logit_bias
        eos = () if params.ignore_eos else self._eos_token_ids
        self._stops[slot] = (*params.stop_token_ids, *eos)
        self._specs[slot] = assignment.logprobs
        if is_penalised:
            split = assignment.prompt_len
            ids = assignment.token_ids
            self._counts.assign(slot, ids[:split], ids[split:])
        else:
            self._counts.release(slot)

    def batch(self, slots: npt.NDArray[np.int32], positions: Int64Array) -> SamplingBatch:
        """What the step's R rows need; `positions` are those of the sampled tokens."""
        fields = self._slots[slots]
        wants_logprobs = np.flatnonzero(fields["wants_logprobs"]).tolist()
        return SamplingBatch(
            noise=self._noise(fields, positions),
            penalties=self._penalties(fields, slots),
            bias=self._biases(fields, slots, positions),
            logprob_rows=wants_logprobs,
            logprob_specs=[self._specs[int(slots[row])] for row in wants_logprobs],
        )

    def takes_largest(self, slots: npt.NDArray[np.int32], positions: Int64Array) -> bool:
        """Whether all that is wanted of every row is the id of its largest raw logit."""
        fields = self._slots[slots]
        flags = ("is_random", "is_penalised", "is_biased", "wants_logprobs")
        barred = (positions < fields["first_stop_position"]).any()
        return not barred and not any(fields[flag].any() for flag in flags)

    def _noise(self, fields: npt.NDArray[np.void], positions: Int64Array) -> NoiseRows | None:
        is_random = fields["is_random"]
        if not is_random.any():
            return None
        rows = None
        if not is_random.all():
            indices = np.flatnonzero(is_random)
            rows = torch.from_numpy(indices).to(self._device, non_blocking=True)
            fields, positions = fields[indices], positions[indices]
        return NoiseRows(
            rows=rows,
            temperature=self._upload(fields, "temperature")[:, None],
            seeds=fields["seed"],
            choices=fields["choice"],
            positions=positions,
            filters=self._filters(fields),
        )

    def _filters(self, fields: npt.NDArray[np.void]) -> FilterRows | None:
        if not fields["is_filtered"].any():
            return None
        top_k = fields["top_k"]
        is_open = top_k >= self._vocab_size
        return FilterRows(
            top_k=self._upload(fields, "top_k"),
            top_p=self._upload(fields, "top_p"),
            min_p=self._upload(fields, "min_p"),
            largest_k=int(np.where(is_open, 1, top_k).max()),
            any_open_top_p=bool((is_open & (fields["top_p"] < 1)).any()),
        )

    def _penalties(
        self, fields: npt.NDArray[np.void], slots: npt.NDArray[np.int32]
    ) -> PenaltyRows | None:
        rows = np.flatnonzero(fields["is_penalised"])
        if not rows.size:
            return None
        count_rows = [self._counts.row(int(slot)) for slot in slots[rows]]
        fields = fields[rows]
        return PenaltyRows(
            rows=torch.from_numpy(rows).to(self._device),
            count_rows=torch.tensor(count_rows, device=self._device),
            repetition=self._upload(fields, "repetition")[:, None],
            frequency=self._upload(fields, "frequency")[:, None],
            presence=self._upload(fields, "presence")[:, None],
        )

    def _biases(
        self, fields: npt.NDArray[np.void], slots: npt.NDArray[np.int32], positions: Int64Array
    ) -> BiasEntries | None:
        may_not_stop = positions < fields["first_stop_position"]
        affected = np.flatnonzero(fields["is_biased"] | may_not_stop)
        entries: list[tuple[int, int, float]] = []
        for row in affected.tolist():
            slot = int(slots[row])
            entries += [(row, token_id, value) for token_id, value in self._bias[slot]]
            if may_not_stop[row]:
                entries += [(row, token_id, float("-inf")) for token_id in self._stops[slot]]
        entries = [entry for entry in entries if 0 <= entry[1] < self._vocab_size]
        if not entries:
            return None
        rows, token_ids, values = zip(*entries, strict=True)
        return BiasEntries(
            rows=torch.tensor(rows, device=self._device),
            token_ids=torch.tensor(token_ids, device=self._device),
            values=torch.tensor(values, dtype=torch.float32, device=self._device),
        )

    def _upload(self, fields: npt.NDArray[np.void], name: str) -> torch.Tensor:
        return torch.from_numpy(fields[name].copy()).to(self._device, non_blocking=True)


def has_penalty(params: SamplingParams) -> bool:
    """Whether the sequence's tokens must be counted."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )
