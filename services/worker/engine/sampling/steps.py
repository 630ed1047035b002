"""Sampling of a step, as the runner sees it, and how it is done with torch.

`TorchSampler` is the reference. `device_sampler.DeviceSampler` does the same on GPUs without
waiting for them: same order, noise and filters, thus the same tokens but for scores that differ
in their last bits only.

Shapes: R rows of the step that sample, N prompt positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.batch import SlotAssignment
from services.worker.engine.messages import LogprobSpec
from services.worker.engine.sampling.counts import TokenCounts
from services.worker.engine.sampling.logprobs import PositionLogprobs, compute_logprobs
from services.worker.engine.sampling.philox import Int64Array
from services.worker.engine.sampling.sampler import sample
from services.worker.engine.sampling.table import SamplingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """A step's tokens. All but `device_ids` is on the host, perhaps not yet filled."""

    # [R] int64
    device_ids: torch.Tensor
    # [R]
    token_ids: torch.Tensor
    # Rows and specs of those that report log-probabilities.
    logprob_rows: list[int]
    logprob_specs: list[LogprobSpec]
    logprobs: PositionLogprobs | None
    prompt_logprobs: list[PositionLogprobs]
    # Comes after the copies to the host, and has the time; None where they were done at once.
    is_filled: torch.cuda.Event | None


def event_now(device: torch.device) -> torch.cuda.Event | None:
    """Has the time at which a GPU gets here; None on a CPU."""
    if device.type == "cpu":
        return None
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class StepSampler(Protocol):
    """Owns what slots sample by; `assign` before their first step."""

    def assign(self, assignment: SlotAssignment) -> None:
        """A slot changes hands."""

    def sample(
        self,
        logits: torch.Tensor,
        slots: npt.NDArray[np.int32],
        positions: Int64Array,
        prompt_logprobs: list[PositionLogprobs],
        *,
        reports: bool,
    ) -> SampledStep:
        """[R, V] -> a token a row, with the log-probabilities asked for if `reports`.

        Logits of 16 bits are taken for the float32 values that they are.
        `positions` are those of the sampled tokens. May overwrite `logits`.
        """

    def takes_largest(self, slots: npt.NDArray[np.int32], positions: Int64Array) -> bool:
        """Whether all that is wanted of every row is the id of its largest raw logit."""

    def chosen(
        self, token_ids: torch.Tensor, prompt_logprobs: list[PositionLogprobs]
    ) -> SampledStep:
        """The same for rows whose ids [R], int64, are known already."""

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: list[int], spec: LogprobSpec
    ) -> PositionLogprobs:
        """[N, V] and the N tokens that follow -> results on the device."""


class TorchSampler:
    """Samples with torch, where the tensors are."""

    def __init__(
        self,
        *,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._device = device
        self._counts = TokenCounts(vocab_size, device)
        self._table = SamplingTable(
            num_slots=num_slots,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            counts=self._counts,
            device=device,
        )

    def assign(self, assignment: SlotAssignment) -> None:
        """A slot changes hands."""
        self._table.assign(assignment)

    def sample(
        self,
        logits: torch.Tensor,
        slots: npt.NDArray[np.int32],
        positions: Int64Array,
        prompt_logprobs: list[PositionLogprobs],
        *,
        reports: bool,
    ) -> SampledStep:
        """As the protocol says; the results are on the host when it returns."""
        batch = self._table.batch(slots, positions)
        logits = logits.float()
        rows = batch.logprob_rows if reports else []
        raw_logits = logits[rows] if rows else None
        step = self.chosen(sample(logits, batch, self._counts), prompt_logprobs)
        if raw_logits is None:
            return step
        logprobs = compute_logprobs(raw_logits, step.device_ids[rows], batch.logprob_specs)
        return replace(
            step, logprob_rows=rows, logprob_specs=batch.logprob_specs, logprobs=logprobs.to_host()
        )

    def takes_largest(self, slots: npt.NDArray[np.int32], positions: Int64Array) -> bool:
        """As the protocol says."""
        return self._table.takes_largest(slots, positions)

    def chosen(
        self, token_ids: torch.Tensor, prompt_logprobs: list[PositionLogprobs]
    ) -> SampledStep:
        """As the protocol says."""
        return SampledStep(
            device_ids=token_ids,
            token_ids=token_ids.cpu(),
            logprob_rows=[],
            logprob_specs=[],
            logprobs=None,
            prompt_logprobs=[each.to_host() for each in prompt_logprobs],
            is_filled=None,
        )

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: list[int], spec: LogprobSpec
    ) -> PositionLogprobs:
        """As the protocol says."""
        following = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        return compute_logprobs(logits.float(), following, [spec] * len(token_ids))


def step_sampler(
    *,
    num_slots: int,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    logits_dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> StepSampler:
    """The sampler for a device; for logits of `logits_dtypes` it compiles nothing later."""
    if device.type != "cuda":
        return TorchSampler(
            num_slots=num_slots, vocab_size=vocab_size, eos_token_ids=eos_token_ids, device=device
        )
    # Imported where there is a GPU: other machines may lack Triton.
    from services.worker.engine.sampling.device_sampler import DeviceSampler

    return DeviceSampler(
        num_slots=num_slots,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        logits_dtypes=logits_dtypes,
        device=device,
    )
