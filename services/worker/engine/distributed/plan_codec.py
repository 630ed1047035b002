"""A StepPlan as one packed buffer, for the other ranks.

Layout: the arrays' lengths as int32, the arrays as int32 in that order, then in msgpack the step
number, the assignments and the prompt log-probability requests.
"""

from __future__ import annotations

import msgspec
import numpy as np

from services.worker.engine.batch import PromptLogprobRequest, SlotAssignment, StepPlan

_ARRAYS = (
    "slots",
    "num_tokens",
    "start_positions",
    "token_ids",
    "sample_rows",
    "page_slots",
    "page_indices",
    "page_ids",
)
_INT_BYTES = 4

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[int, list[SlotAssignment], list[PromptLogprobRequest]])


def encode_plan(plan: StepPlan) -> bytes:
    """The plan in bytes."""
    arrays = [np.ascontiguousarray(getattr(plan, name), dtype=np.int32) for name in _ARRAYS]
    header = np.array([len(array) for array in arrays], dtype=np.int32)
    rest = _encoder.encode((plan.step_number, plan.assignments, plan.prompt_logprobs))
    return b"".join([header.tobytes(), *(array.tobytes() for array in arrays), rest])


def decode_plan(packed: bytes) -> StepPlan:
    """The inverse of `encode_plan`; arrays are views of `packed`."""
    header = np.frombuffer(packed, np.int32, len(_ARRAYS))
    offset = header.nbytes
    arrays = {}
    for name, length in zip(_ARRAYS, header.tolist(), strict=True):
        arrays[name] = np.frombuffer(packed, np.int32, length, offset)
        offset += length * _INT_BYTES
    step_number, assignments, prompt_logprobs = _decoder.decode(memoryview(packed)[offset:])
    return StepPlan(
        step_number=step_number,
        assignments=assignments,
        prompt_logprobs=prompt_logprobs,
        **arrays,
    )
