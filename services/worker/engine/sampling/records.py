"""What the kernels of sampling know of a row, as one record that is uploaded.

The layout is that of `kernels/sampling_math.py`, one int32 word a field, floats as their bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.kernels.sampling_math import ARGMAX, FILTER, GROUPS, MASS, NOISE
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling.table import SMALLEST_TEMPERATURE

RECORD = np.dtype(
    [
        # Row of the step's logits, and of the copies with penalties and biases (-1: none).
        ("logits_row", np.int32),
        ("changed_row", np.int32),
        ("mode", np.int32),
        ("temperature", np.float32),
        # V keeps all.
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("choice", np.int32),
        ("position", np.int32),
        # -1: nothing is counted.
        ("count_row", np.int32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("bias_row", np.int32),
        # Of the list at bias_row, how many entries act at this position.
        ("num_biases", np.int32),
        ("requested_row", np.int32),
        ("num_requested", np.int32),
        ("num_top", np.int32),
        # Of a row that reports: where its chosen id stands.
        ("sampled_row", np.int32),
        ("changed_job", np.int32),
        # Not read by kernels. Biases, then those and the bars on stop ids, which act at positions
        # before `first_stop_position`, are the list at bias_row.
        ("num_barred", np.int32),
        ("first_stop_position", np.int32),
    ]
)

# Words of the fields that are read or set for a whole step.
LOGITS_ROW_WORD, MODE_WORD, SAMPLED_ROW_WORD = 0, 2, 20

_INT32_MAX = 2**31 - 1


def slot_record(
    assignment: SlotAssignment, vocab_size: int, num_barred: int
) -> npt.NDArray[np.void]:
    """A record [] of a slot's constants; `num_barred` biases and bars together."""
    params = assignment.sampling
    record = np.zeros((), RECORD)
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    record["changed_row"] = -1
    record["mode"] = _mode(params, top_k, vocab_size)
    record["temperature"] = params.temperature if _is_random(params) else 1.0
    record["top_k"] = top_k
    record["top_p"] = params.top_p
    record["log_min_p"] = torch.tensor(params.min_p, dtype=torch.float32).log().item()
    record["seed_low"] = params.seed & 0xFFFFFFFF
    record["seed_high"] = params.seed >> 32 & 0xFFFFFFFF
    record["choice"] = assignment.choice_index
    record["count_row"] = -1
    record["repetition"] = params.repetition_penalty
    record["frequency"] = params.frequency_penalty
    record["presence"] = params.presence_penalty
    record["num_biases"] = sum(0 <= token_id < vocab_size for token_id, _ in params.logit_bias)
    record["num_barred"] = num_barred
    first_stop = assignment.prompt_len + params.min_new_tokens
    record["first_stop_position"] = min(first_stop, _INT32_MAX)
    return record


def report_record(spec: LogprobSpec, vocab_size: int, requested_row: int) -> npt.NDArray[np.void]:
    """A record [] of the pass that finds log-probabilities of raw logits, but for its row."""
    record = np.zeros((), RECORD)
    record["changed_row"] = -1
    record["mode"] = GROUPS | MASS
    record["temperature"] = 1.0
    record["count_row"] = -1
    record["requested_row"] = requested_row
    record["num_requested"] = len(spec.token_ids)
    record["num_top"] = min(spec.num_top, vocab_size)
    return record


def as_words(record: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
    """A record [] -> its words, [1, words]."""
    return record.reshape(1).view(np.int32).reshape(1, -1)


def _is_random(params: SamplingParams) -> bool:
    return params.temperature >= SMALLEST_TEMPERATURE


def _mode(params: SamplingParams, top_k: int, vocab_size: int) -> int:
    if not _is_random(params):
        return ARGMAX
    if top_k < vocab_size:
        # Few tokens are left: noise is drawn for those alone.
        return GROUPS | FILTER
    if params.top_p < 1:
        return NOISE | GROUPS | MASS | FILTER
    return NOISE | GROUPS | FILTER if params.min_p > 0 else NOISE
