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
from services.worker.engine.kernels.sampling_math import FILTER
from services.worker.engine.kernels.sampling_report import report
from services.worker.engine.kernels.sampling_scan import scan
from services.worker.engine.messages import LogprobSpec
from services.worker.engine.sampling.counts import TokenCounts
from services.worker.engine.sampling.logprobs import PositionLogprobs
from services.worker.engine.sampling.philox import Int64Array
from services.worker.engine.sampling.records import RECORD, report_records, slot_record
from services.worker.engine.sampling.slot_lists import SlotLists
from services.worker.engine.sampling.steps import SampledStep
from services.worker.engine.sampling.table import has_penalty

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
        device: torch.device,
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._records = np.zeros(num_slots, RECORD)
        self._reports = np.zeros(num_slots, np.bool_)
        self._specs = [_NO_SPEC] * num_slots
        self._requested_rows = [0] * num_slots
        self._counts = TokenCounts(vocab_size, device)
        self._biases = SlotLists(device)
        self._requested = SlotLists(device)
        # Ids that all positions of a prompt ask about, for as long as its kernel is issued.
        self._prompt_requested = SlotLists(device)

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
        self._records[slot] = record
        self._reports[slot] = spec.output
        self._specs[slot] = spec
        self._requested_rows[slot] = self._requested.assign(slot, _entries(spec))

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
            packed = token_ids.to(torch.int32)
            return self._copied(packed, token_ids, [], [], (0, 0), prompt_logprobs)
        records, num_changed = self._step_records(slots, positions)
        rows = np.flatnonzero(self._reports[slots]).tolist() if reports else []
        specs = [self._specs[slots[row]] for row in rows]
        widths = _widths(specs, self._vocab_size)
        summarised = bool(rows) or bool((records["mode"] & FILTER).any())
        if rows:
            lists = [self._requested_rows[slots[row]] for row in rows]
            records = np.concatenate((records, report_records(rows, specs, lists)))
        there = upload_array(self._device, _words(records))
        changed = logits
        if num_changed:
            changed = change(
                there,
                logits,
                num_changed,
                prompt_seen=self._counts.prompt_seen,
                output_counts=self._counts.output_counts,
                biases=self._biases.entries,
            )
        found = scan(there, logits, changed, summarised)
        packed = torch.empty(
            num_rows + len(rows) * _width(widths), dtype=torch.int32, device=self._device
        )
        choose(there, logits, changed, found, self._counts.output_counts, token_ids, packed)
        if rows:
            lines = packed[num_rows:].view(len(rows), -1)
            report(there, logits, found, token_ids, self._requested.entries, lines,
                   num_top=widths[0])  # fmt: skip
        return self._copied(packed, token_ids, rows, specs, widths, prompt_logprobs)

    def prompt_logprobs(
        self, logits: torch.Tensor, token_ids: list[int], spec: LogprobSpec
    ) -> PositionLogprobs:
        """As `StepSampler` says."""
        num_rows = len(token_ids)
        specs = [spec] * num_rows
        widths = _widths([spec], self._vocab_size)
        row = self._prompt_requested.assign(0, _entries(spec))
        records = report_records(range(num_rows), specs, [row] * num_rows)
        there = upload_array(self._device, _words(records))
        following = upload_array(self._device, np.array(token_ids, np.int64))
        found = scan(there, logits, logits, True)
        lines = torch.empty((num_rows, _width(widths)), dtype=torch.int32, device=self._device)
        report(there, logits, found, following, self._prompt_requested.entries, lines,
               num_top=widths[0])  # fmt: skip
        return _unpacked(lines, widths)

    def _step_records(
        self, slots: npt.NDArray[np.int32], positions: Int64Array
    ) -> tuple[npt.NDArray[np.void], int]:
        """Records of the rows, and how many of them read a changed copy."""
        records = self._records[slots]
        records["logits_row"] = np.arange(len(slots))
        records["position"] = positions
        may_not_stop = records["position"] < records["first_stop_position"]
        records["num_biases"] = np.where(may_not_stop, records["num_barred"], records["num_biases"])
        is_changed = (records["num_biases"] > 0) | (records["count_row"] >= 0)
        jobs = np.flatnonzero(is_changed)
        if jobs.size:
            records["changed_row"][jobs] = np.arange(jobs.size)
            records["changed_job"][: jobs.size] = jobs
        return records, jobs.size

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
        host = (torch.cat(parts) if prompts else packed).to("cpu", non_blocking=True)
        own, *others = torch.split(host, [len(part) for part in parts])
        lines = own[num_rows:].view(len(rows), -1) if rows else None
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
            is_filled=_event(self._device),
        )


def _words(records: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
    return records.view(np.int32).reshape(len(records), -1)


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


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type == "cpu":
        return None
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
