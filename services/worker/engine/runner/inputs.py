"""The device's tables over slots, and a plan turned into a forward pass's inputs.

Shapes: S rows of the step, T tokens, R rows that sample, N rows of a captured step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.attention.upload import upload, upload_into
from services.worker.engine.batch import LAST_SAMPLED, Int32Array, StepPlan
from services.worker.engine.layers.parameters import MIN_CPU_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What one forward pass and its sampling read."""

    # [T] on the device, int64; on a CPU with padding up to MIN_CPU_ROWS.
    token_ids: torch.Tensor
    positions: torch.Tensor
    # Of as many tokens on the device, int64, without a CPU's padding: places in the pool.
    locations: torch.Tensor
    attention: AttentionInputs
    # [S] first token of each row in the step, on the host.
    first_tokens: npt.NDArray[np.int64]
    # Tokens whose hidden state is sampled from, [R], on a CPU padded likewise, on a GPU up to one
    # of the tables' `row_sizes`; None when it is all T.
    sample_tokens: torch.Tensor | None
    # [R] slots of the rows that sample, and positions of the tokens they get, on the host.
    sample_slots: npt.NDArray[np.int32]
    sample_positions: npt.NDArray[np.int64]
    # [R] the same slots on the device, int64.
    sampled_slots: torch.Tensor


# Rows of the packed int64 tensor that a captured step reads: ids (LAST_SAMPLED where only the
# device knows), slots, positions, pool locations.
PACKED_ROWS = 4


@dataclass(frozen=True, slots=True)
class _TokenLayout:
    """Where a plan's tokens stand."""

    # [T]
    slots: npt.NDArray[np.integer]
    positions: npt.NDArray[np.int64]
    # [S] first token of each row, and the one after its last.
    firsts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, plan: StepPlan) -> _TokenLayout:
        num_tokens, starts = plan.num_tokens, plan.start_positions.astype(np.int64)
        ends = np.cumsum(num_tokens, dtype=np.int64)
        firsts = ends - num_tokens
        if len(plan.token_ids) == len(num_tokens):
            return cls(plan.slots, starts, firsts, ends)
        positions = np.arange(ends[-1]) + np.repeat(starts - firsts, num_tokens)
        return cls(np.repeat(plan.slots, num_tokens), positions, firsts, ends)


class SlotTables:
    """Owns the page table and the last sampled ids, both by slot.

    The page table has a twin on the host, from which pool locations are computed. One slot more
    than sequences can hold, `padding_slot`, stands for the padding of captured steps; all its
    pages are `padding_page`, which no sequence has, so padding overwrites nobody's keys.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_pages: int,
        page_size: int,
        padding_page: int,
        device: torch.device,
        row_sizes: tuple[int, ...] = (),
    ) -> None:
        """`row_sizes` are numbers of rows, ascending, that steps are padded to for sampling."""
        self.padding_slot = num_slots
        self._row_sizes = np.array(row_sizes, np.intp)
        self._page_size = page_size
        self._device = device
        self._host_pages = np.zeros((num_slots + 1, max_pages), np.int32)
        self._host_pages[num_slots] = padding_page
        self._last_ids = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        # On a CPU both twins are the same memory.
        self._page_table = torch.from_numpy(self._host_pages).to(device)

    @property
    def host_page_table(self) -> Int32Array:
        """[slots, pages] as of the last prepared plan."""
        return self._host_pages

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Apply the plan's page changes and lay out its tokens."""
        self._apply_page_changes(plan)
        tokens = _TokenLayout.of(plan)
        token_ids, slots, positions, locations, *rest = upload(
            self._device,
            plan.token_ids,
            tokens.slots,
            tokens.positions,
            self._locations(tokens.slots, tokens.positions),
            *self._selections(plan, tokens),
        )
        if (plan.token_ids == LAST_SAMPLED).any():
            token_ids = self.resolve(token_ids, slots)
        packed = (self._padded(token_ids), self._padded(positions), locations)
        return self._inputs(plan, tokens, packed, tuple(rest))

    def prepare_padded(self, plan: StepPlan, buffer: torch.Tensor, width: int) -> StepInputs:
        """The same with ids, positions and locations padded to `width` at the head of `buffer`.

        `padded_view` gives what a capture reads from there. Ids are not resolved.
        """
        self._apply_page_changes(plan)
        tokens = _TokenLayout.of(plan)
        selections = self._selections(plan, tokens)
        head = self._packed(width, plan.token_ids, tokens.slots, tokens.positions)
        host = np.concatenate((head.ravel(), *selections), dtype=np.int64)
        upload_into(buffer[: len(host)], host)
        rest = torch.split(buffer[head.size : len(host)], [len(each) for each in selections])
        token_ids, _, positions, locations = padded_view(buffer, width)
        return self._inputs(plan, tokens, (token_ids, positions, locations), rest)

    def prepare_captured(self, plan: StepPlan, packed: torch.Tensor) -> StepInputs:
        """A step of rows with one token each that all sample, padded to N rows.

        Writes `packed` [PACKED_ROWS, N], of which the inputs are views; ids are not resolved.
        """
        self._apply_page_changes(plan)
        num_rows, width = len(plan.slots), packed.shape[1]
        host = self._packed(width, plan.token_ids, plan.slots, plan.start_positions)
        upload_into(packed, host)
        return StepInputs(
            token_ids=packed[0],
            positions=packed[2],
            locations=packed[3],
            attention=AttentionInputs(
                slots=host[1].astype(np.int32),
                num_tokens=np.ones(width, np.int32),
                start_positions=host[2].astype(np.int32),
                host_page_table=self._host_pages,
                page_table=self._page_table,
            ),
            first_tokens=np.arange(num_rows),
            sample_tokens=None,
            sample_slots=plan.slots,
            sample_positions=host[2, :num_rows] + 1,
            sampled_slots=packed[1, :num_rows],
        )

    def _packed(
        self,
        width: int,
        token_ids: Int32Array,
        slots: npt.NDArray[np.integer],
        positions: npt.NDArray[np.integer],
    ) -> npt.NDArray[np.int64]:
        """[PACKED_ROWS, width] of these tokens and padding."""
        packed = np.zeros((PACKED_ROWS, width), np.int64)
        packed[1] = self.padding_slot
        for row, values in enumerate((token_ids, slots, positions)):
            packed[row, : len(values)] = values
        packed[3] = self._locations(packed[1], packed[2])
        return packed

    def _inputs(
        self,
        plan: StepPlan,
        tokens: _TokenLayout,
        packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        selections: tuple[torch.Tensor, ...],
    ) -> StepInputs:
        token_ids, positions, locations = packed
        sample_tokens, sampled_slots = selections
        rows = plan.sample_rows
        samples_all = len(rows) == len(plan.token_ids) == len(sample_tokens)
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            locations=locations,
            attention=AttentionInputs(
                slots=plan.slots,
                num_tokens=plan.num_tokens,
                start_positions=plan.start_positions,
                host_page_table=self._host_pages,
                page_table=self._page_table,
            ),
            first_tokens=tokens.firsts,
            sample_tokens=None if samples_all else self._padded(sample_tokens),
            sample_slots=plan.slots[rows],
            sample_positions=tokens.positions[tokens.ends[rows] - 1] + 1,
            sampled_slots=sampled_slots,
        )

    def resolve(self, token_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[T] ids and slots on the device -> ids, the slot's newest where LAST_SAMPLED stands."""
        return torch.where(token_ids == LAST_SAMPLED, self._last_ids[slots], token_ids)

    def note_sampled(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """[R] slots on the device got these ids."""
        self._last_ids.index_copy_(0, slots, token_ids)

    def _locations(
        self, slots: npt.NDArray[np.integer], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        pages = self._host_pages[slots, positions // self._page_size].astype(np.int64)
        locations: npt.NDArray[np.int64] = pages * self._page_size + positions % self._page_size
        return locations

    def _apply_page_changes(self, plan: StepPlan) -> None:
        if not len(plan.page_slots):
            return
        self._host_pages[plan.page_slots, plan.page_indices] = plan.page_ids
        if self._device.type != "cpu":
            slots, indices, pages = upload(
                self._device, plan.page_slots, plan.page_indices, plan.page_ids
            )
            self._page_table.index_put_((slots, indices), pages.to(torch.int32))

    def _selections(
        self, plan: StepPlan, tokens: _TokenLayout
    ) -> tuple[npt.NDArray[np.int64], Int32Array]:
        """Tokens to sample from, some of them again as padding, and the slots that get the ids."""
        rows = plan.sample_rows
        chosen = tokens.ends[rows] - 1
        if len(rows) and len(self._row_sizes):
            size = self._row_sizes[np.searchsorted(self._row_sizes, len(rows))]
            chosen = np.pad(chosen, (0, int(size) - len(rows)), mode="edge")
        return chosen, plan.slots[rows]

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu" and len(values) == 1:
            return values.expand(MIN_CPU_ROWS)
        return values


def padded_view(buffer: torch.Tensor, width: int) -> torch.Tensor:
    """[PACKED_ROWS, width]: what is in the same place for every step padded to `width` tokens."""
    return buffer[: PACKED_ROWS * width].view(PACKED_ROWS, width)


def padding_only() -> StepPlan:
    """The plan of a step without rows."""
    empty = np.zeros(0, np.int32)
    return StepPlan(
        step_number=0,
        slots=empty,
        num_tokens=empty,
        start_positions=empty,
        token_ids=empty,
        sample_rows=empty,
        page_slots=empty,
        page_indices=empty,
        page_ids=empty,
    )
