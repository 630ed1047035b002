"""Sampling on a GPU: a few kernels, one upload and one copy back, and no wait.

A step's rows become jobs: one that samples each, then one for each row that reports
log-probabilities of its raw logits. Records of slots are kept on the host and uploaded for the rows
of the step; what has many values (counts, biases, ids asked about) is kept on the device by slot.

Shapes: R rows that sample, L of them that report, J = R + L jobs, N prompt positions, V vocabulary,
K most likely tokens, M requested ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.attention.upload import upload_array
from services.worker.engine.batch import SlotAssignment
from services.worker.engine.kernels.sampling_changes import change
from services.worker.engine.kernels.sampling_choose import choose
from services.worker.engine.kernels.sampling_math import ARGMAX, FILTER
from services.worker.engine.kernels.sampling_report import report
from services.worker.engine.kernels.sampling_scan import scan
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.sampling.counts import TokenCounts
from services.worker.engine.sampling.logprobs import PositionLogprobs
from services.worker.engine.sampling.philox import Int64Array
from services.worker.engine.sampling.records import (
    LOGITS_ROW_WORD,
    MODE_WORD,
    RECORD,
    SAMPLED_ROW_WORD,
    as_words,
    report_record,
    slot_record,
)
from services.worker.engine.sampling.slot_lists import SlotLists
from services.worker.engine.sampling.steps import SampledStep, event_now
from services.worker.engine.sampling.table import has_penalty

_WORDS = RECORD.itemsize // 4
_NO_SPEC = LogprobSpec()


class DeviceSampler:
    """Owns the records of slots, and their counts and lists on the device.

    A row's token depends on its own logits and record only, not on its neighbours.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        logits_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
        device: torch.device,
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        # [slots, words]: how each samples, and how it reports.
        self._records = np.zeros((num_slots, _WORDS), np.int32)
        self._reports = np.zeros((num_slots, _WORDS), np.int32)
        self._wants_report = np.zeros(num_slots, np.bool_)
        # Whether penalties, biases or bars may act.
        self._may_change = np.zeros(num_slots, np.bool_)
        self._specs = [_NO_SPEC] * num_slots
        self._counts = TokenCounts(vocab_size, device)
        self._biases = SlotLists(device)
        self._requested = SlotLists(device)
        # Ids that all positions of a prompt ask about, for as long as its kernel is issued.
        self._prompt_requested = SlotLists(device)
        # Stands for changed copies where no row has one: the kernels' types stay the same.
        self._unchanged = torch.zeros(4, dtype=torch.float32, device=device)
        for dtype in logits_dtypes:
            self._compile(dtype)

    def assign(self, assignment: SlotAssignment) -> None:
        """A slot changes hands."""
        slot, params, spec = assignment.slot, assignment.sampling, assignment.logprobs
        biases = [each for each in params.logit_bias if 0 <= each[0] < self._vocab_size]
        eos = () if params.ignore_eos else self._eos_token_ids
        stops = [each for each in (*params.stop_token_ids, *eos) if 0 <= each < self._vocab_size]
        bars = [(token_id, float("-inf")) for token_id in stops] if params.min_new_tokens else []
        record = slot_record(assignment, self._vocab_size, len(biases) + len(bars))
        record["bias_row"] = self._biases.assign(slot, biases + bars)
        if has_penalty(params):
            split, ids = assignment.prompt_len, assignment.token_ids
            self._counts.assign(slot, ids[:split], ids[split:])
            record["count_row"] = self._counts.row(slot)
        else:
            self._counts.release(slot)
        self._records[slot] = as_words(record)
        self._may_change[slot] = has_penalty(params) or record["num_barred"] > 0
        requested_row = self._requested.assign(slot, _entries(spec))
        self._reports[slot] = as_words(report_record(spec, self._vocab_size, requested_row))
        self._wants_report[slot] = spec.output
        self._specs[slot] = spec

    def sample(
        self,
        logits: torch.Tensor,
        slots: npt.NDArray[np.int32],
        positions: Int64Array,
        prompt_logprobs: list[PositionLogprobs],
        *,
        reports: bool,
    ) -> SampledStep:
        """As `StepSampler` says; leaves `logits` as they are."""
        num_rows = len(slots)
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        if num_rows == 0:
            return self.chosen(token_ids, prompt_logprobs)
        words, num_changed = self._step_words(slots, positions)
        summarised = bool(np.bitwise_or.reduce(words[:, MODE_WORD]) & FILTER)
        rows: list[int] = []
        specs: list[LogprobSpec] = []
        widths = (0, 0)
        if reports and self._wants_report.take(slots).any():
            reporting = np.flatnonzero(self._wants_report.take(slots))
            lines = self._reports.take(slots[reporting], 0)
            lines[:, LOGITS_ROW_WORD] = lines[:, SAMPLED_ROW_WORD] = reporting
            words = np.concatenate((words, lines))
            rows = reporting.tolist()
            specs = [self._specs[slot] for slot in slots[reporting].tolist()]
            widths = _widths(specs, self._vocab_size)
            summarised = True
        records = upload_array(self._device, words)
        changed = self._unchanged
        if num_changed:
            changed = change(
                records,
                logits,
                num_changed,
                prompt_seen=self._counts.prompt_seen,
                output_counts=self._counts.output_counts,
                biases=self._biases.entries,
            )
        found = scan(records, logits, changed, summarised)
        num_words = _padded(num_rows) + len(rows) * _width(widths)
        packed = torch.empty(num_words, dtype=torch.int32, device=self._device)
        choose(records, logits, changed, found, self._counts.output_counts, token_ids, packed)
        if rows:
            out = packed[_padded(num_rows) :].view(len(rows), -1)
            report(
                records, logits, found, token_ids, self._requested.entries, out, num_top=widths[0]
            )
        return self._copied(packed, token_ids, rows, specs, widths, prompt_logprobs)

    def takes_largest(self, slots: npt.NDArray[np.int32], positions: Int64Array) -> bool:
        """As `StepSampler` says."""
        is_greedy = (self._records[:, MODE_WORD].take(slots) == ARGMAX).all()
        if not is_greedy or self._wants_report.take(slots).any():
            return False
        return self._step_words(slots, positions)[1] == 0

    def chosen(
        self, token_ids: torch.Tensor, prompt_logprobs: list[PositionLogprobs]
    ) -> SampledStep:
        """As `StepSampler` says."""
        return self._copied(token_ids.to(torch.int32), token_ids, [], [], (0, 0), prompt_logprobs)

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: list[int], spec: LogprobSpec
    ) -> PositionLogprobs:
        """As `StepSampler` says."""
        num_rows = len(token_ids)
        widths = _widths([spec], self._vocab_size)
        row = self._prompt_requested.assign(0, _entries(spec))
        words = as_words(report_record(spec, self._vocab_size, row)).repeat(num_rows, 0)
        words[:, LOGITS_ROW_WORD] = words[:, SAMPLED_ROW_WORD] = np.arange(num_rows)
        records = upload_array(self._device, words)
        following = upload_array(self._device, np.array(token_ids, np.int64))
        found = scan(records, logits, self._unchanged, True)
        out = torch.empty((num_rows, _width(widths)), dtype=torch.int32, device=self._device)
        requested = self._prompt_requested.entries
        report(records, logits, found, following, requested, out, num_top=widths[0])
        return _unpacked(out, widths)

    def _compile(self, logits_dtype: torch.dtype) -> None:
        """Sample a row with every feature and one with none, so that no later step compiles."""
        everything = SamplingParams(presence_penalty=1.0, top_p=0.5)
        logits = torch.zeros((1, self._vocab_size), dtype=logits_dtype, device=self._device)
        slots, positions = np.zeros(1, np.int32), np.zeros(1, np.int64)
        for sampling, spec in (
            (everything, LogprobSpec(output=True)),
            (SamplingParams(temperature=0.0), _NO_SPEC),
        ):
            self.assign(
                SlotAssignment(
                    slot=0,
                    sampling=sampling,
                    logprobs=spec,
                    choice_index=0,
                    prompt_len=0,
                    token_ids=[],
                )
            )
            self.sample(logits, slots, positions, [], reports=True)

    def _step_words(
        self, slots: npt.NDArray[np.int32], positions: Int64Array
    ) -> tuple[npt.NDArray[np.int32], int]:
        """Records [R, words] of the rows, and how many of them read a changed copy."""
        words = self._records.take(slots, 0)
        records = words.view(RECORD)[:, 0]
        records["logits_row"] = np.arange(len(slots))
        records["position"] = positions
        if not self._may_change.take(slots).any():
            return words, 0
        may_not_stop = records["position"] < records["first_stop_position"]
        records["num_biases"] = np.where(may_not_stop, records["num_barred"], records["num_biases"])
        jobs = np.flatnonzero((records["num_biases"] > 0) | (records["count_row"] >= 0))
        records["changed_row"][jobs] = np.arange(jobs.size)
        records["changed_job"][: jobs.size] = jobs
        return words, jobs.size

    def _copied(
        self,
        packed: torch.Tensor,
        token_ids: torch.Tensor,
        rows: list[int],
        specs: list[LogprobSpec],
        widths: tuple[int, int],
        prompts: list[PositionLogprobs],
    ) -> SampledStep:
        """Start the step's one copy to the host."""
        num_rows = len(token_ids)
        parts = [packed, *(_packed(each) for each in prompts)]
        # The host's memory for such a copy is pinned, so that nothing waits for it.
        own = (torch.cat(parts) if prompts else packed).to("cpu", non_blocking=True)
        others: list[torch.Tensor] = []
        if prompts:
            own, *others = torch.split(own, [len(part) for part in parts])
        lines = own[_padded(num_rows) :].view(len(rows), -1) if rows else None
        return SampledStep(
            device_ids=token_ids,
            token_ids=own[:num_rows],
            logprob_rows=rows,
            logprob_specs=specs,
            logprobs=None if lines is None else _unpacked(lines, widths),
            prompt_logprobs=[
                _unpacked(part.view(len(each.chosen), -1), _widths_of(each))
                for part, each in zip(others, prompts, strict=True)
            ],
            is_filled=event_now(self._device),
        )


def _padded(num_rows: int) -> int:
    """Where lines begin after so many ids: at 16 bytes."""
    return -(-num_rows // 4) * 4


def _width(widths: tuple[int, int]) -> int:
    """Words of a line: the chosen token's value, K values and ids, M values."""
    return 1 + 2 * widths[0] + widths[1]


def _entries(spec: LogprobSpec) -> list[tuple[int, float]]:
    return [(token_id, 0.0) for token_id in spec.token_ids]


def _widths(specs: list[LogprobSpec], vocab_size: int) -> tuple[int, int]:
    """K and M: the most that any spec asks for."""
    num_top = max((spec.num_top for spec in specs), default=0)
    return min(num_top, vocab_size), max((len(spec.token_ids) for spec in specs), default=0)


def _widths_of(results: PositionLogprobs) -> tuple[int, int]:
    return results.top_ids.shape[1], results.requested.shape[1]


def _unpacked(lines: torch.Tensor, widths: tuple[int, int]) -> PositionLogprobs:
    """[N, 1 + 2 K + M] int32 -> views of it."""
    num_top = widths[0]
    values = lines.view(torch.float32)
    return PositionLogprobs(
        values[:, 0],
        values[:, 1 : 1 + num_top],
        lines[:, 1 + num_top : 1 + 2 * num_top],
        values[:, 1 + 2 * num_top :],
    )


def _packed(results: PositionLogprobs) -> torch.Tensor:
    """The inverse of `_unpacked`, flat."""
    values, requested = results.top_values, results.requested
    parts = (
        results.chosen[:, None].view(torch.int32),
        values.view(torch.int32),
        results.top_ids,
        requested.view(torch.int32),
    )
    return torch.cat(parts, dim=1).flatten()
