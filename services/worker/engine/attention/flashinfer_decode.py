"""FlashInfer's calls for rows with one token of which some share prefixes.

A plan is written to pinned memory and copied from there while the host goes on, so plans of
consecutive steps use different wrappers; with two steps in flight, two are enough.

Shapes: S rows, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flashinfer
import numpy as np
import numpy.typing as npt
import torch
from flashinfer.decode import fast_decode_plan

from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.attention.page_lists import PageLists, indptr_of, page_lists
from services.worker.engine.attention.sharing import PrefixGroups
from services.worker.engine.batch import Int32Array
from services.worker.engine.kernels.merge import merge_attention

_STEPS_IN_FLIGHT = 2

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class DecodeCalls:
    """Owns tensor-core decode wrappers used in turn; `shape` is what FlashInfer plans with.

    Relies on the wrapper's private names for its lists: the full plan looks at every row's
    length in Python, which takes as long as a layer; the fast one takes host lists but keeps them.
    """

    def __init__(self, float_workspace: torch.Tensor, shape: dict[str, Any]) -> None:
        self._device = float_workspace.device
        self._shape = shape
        self._wrappers = [
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                float_workspace, "NHD", use_tensor_cores=True
            )
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._is_planned = [False] * _STEPS_IN_FLIGHT
        self._turn = 0

    def plan(self, pages: PageLists) -> Any:
        """A wrapper ready to run rows of one token each over `pages`."""
        self._turn = turn = (self._turn + 1) % _STEPS_IN_FLIGHT
        wrapper = self._wrappers[turn]
        num_rows = len(pages.last_page_len)
        # One copy for all lists.
        host = np.concatenate(
            (pages.indptr.numpy(), pages.last_page_len.numpy(), pages.indices), dtype=np.int32
        )
        lists = torch.from_numpy(host).pin_memory().to(self._device, non_blocking=True)
        indptr, last_page_len, indices = torch.split(
            lists, [num_rows + 1, num_rows, len(pages.indices)]
        )
        if self._is_planned[turn]:
            fast_decode_plan(
                wrapper,
                pages.indptr,
                indices,
                pages.last_page_len,
                global_override_indptr_cpu=pages.indptr,
                **self._shape,
            )
            wrapper._paged_kv_indptr_buf = indptr
            wrapper._paged_kv_last_page_len_buf = last_page_len
        else:
            # The full plan chooses the kernels, which the fast one takes as chosen.
            wrapper.plan(pages.indptr, indices, pages.last_page_len, **self._shape)
            self._is_planned[turn] = True
        return wrapper


class PlannedCascade:
    """Decode rows of which some share prefixes: two passes and a merge a layer."""

    def __init__(
        self, own: Any, shared: Any, shared_rows: slice, *, num_rows: int, scratch: _Scratch
    ) -> None:
        self._own = own
        self._shared = shared
        self._rows = shared_rows
        self._own_lse = scratch.lse[:num_rows]
        self._shared_lse = scratch.shared_lse[: shared_rows.stop - shared_rows.start]
        self._shared_out = scratch.out[: shared_rows.stop - shared_rows.start]

    def run(self, q: torch.Tensor, pages: KeysAndValues, out: torch.Tensor) -> None:
        """q [S, H, D] -> out [S, H, D], contiguous."""
        rows, lse, shared_out, shared_lse = (
            self._rows, self._own_lse, self._shared_out, self._shared_lse
        )  # fmt: skip
        self._own.run(q, pages, out=out, lse=lse, return_lse=True)
        self._shared.run(q[rows], pages, out=shared_out, lse=shared_lse, return_lse=True)
        merge_attention(out[rows], lse[rows], shared_out, shared_lse)


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What a layer's passes leave for its merge; layers run one by one, so one set serves all."""

    # [S, H], [S, H] and [S, H, D]
    lse: torch.Tensor
    shared_lse: torch.Tensor
    out: torch.Tensor

    @classmethod
    def of(cls, num_rows: int, shape: dict[str, Any], device: torch.device) -> _Scratch:
        heads = (num_rows, shape["num_qo_heads"])
        lse, shared_lse = torch.empty((2, *heads), dtype=torch.float32, device=device)
        out = torch.empty((*heads, shape["head_dim"]), dtype=shape["q_data_type"], device=device)
        return cls(lse, shared_lse, out)


class CascadeCalls:
    """Owns prefill wrappers for passes over shared pages, used in turn whenever groups change.

    While the same rows share the same pages, one plan serves all steps.
    """

    def __init__(
        self, float_workspace: torch.Tensor, decode: DecodeCalls, shape: dict[str, Any]
    ) -> None:
        self._device = float_workspace.device
        self._decode = decode
        self._shape = shape
        self._page_size = shape["page_size"]
        self._scratch = _Scratch.of(1, shape, self._device)
        # FA2 packs the query heads of a key/value head into one tile and splits long prefixes;
        # FA3 as FlashInfer has it does neither, and a group has few rows.
        self._wrappers = [
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(float_workspace, "NHD", backend="fa2")
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._turn = 0
        self._planned_groups: PrefixGroups | None = None
        self._rows = slice(0)
        self._load_kernels()

    def plan(self, inputs: AttentionInputs, num_rows: int, groups: PrefixGroups) -> PlannedCascade:
        """The step's first `num_rows` rows, one token each, of which `groups` share prefixes."""
        own = page_lists(inputs, slice(0, num_rows), self._page_size, groups.pages_by_row(num_rows))
        if groups is not self._planned_groups:
            self._plan_shared(inputs, groups)
            self._planned_groups = groups
        if num_rows > len(self._scratch.lse):
            self._scratch = _Scratch.of(num_rows, self._shape, self._device)
        return PlannedCascade(
            self._decode.plan(own),
            self._wrappers[self._turn],
            self._rows,
            num_rows=num_rows,
            scratch=self._scratch,
        )

    def _plan_shared(self, inputs: AttentionInputs, groups: PrefixGroups) -> None:
        self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT
        firsts, stops = groups.first_rows, groups.first_rows + groups.num_rows
        self._rows = slice(int(firsts[0]), int(stops[-1]))
        # Rows between groups make groups that share nothing: their log-sums are -inf.
        bounds = np.stack((firsts, stops), axis=1).ravel() - firsts[0]
        num_pages = np.zeros(len(bounds) - 1, np.intp)
        num_pages[::2] = groups.num_pages
        is_filled = np.append(np.diff(bounds) > 0, True)
        bounds, num_pages = bounds[is_filled], num_pages[is_filled[:-1]]
        slots = inputs.slots[firsts]
        indices = np.concatenate(
            [
                inputs.host_page_table[slot, :count]
                for slot, count in zip(slots.tolist(), groups.num_pages.tolist(), strict=True)
            ]
        )
        self._plan_groups(bounds, num_pages, indices, int(groups.num_rows.max()))

    def _plan_groups(
        self,
        bounds: npt.NDArray[np.integer],
        num_pages: npt.NDArray[np.intp],
        indices: Int32Array,
        most_rows: int,
    ) -> None:
        """G groups: rows bounds[g] to bounds[g + 1] - 1 share num_pages[g] of the `indices`."""
        shape = dict(self._shape)
        shape["head_dim_qk"] = shape.pop("head_dim")
        self._wrappers[self._turn].plan(
            torch.from_numpy(bounds.astype(np.int32)),
            indptr_of(num_pages),
            torch.from_numpy(indices).pin_memory().to(self._device, non_blocking=True),
            # Only full pages are shared.
            torch.from_numpy(np.where(num_pages > 0, self._page_size, 0).astype(np.int32)),
            max_token_per_sequence=most_rows,
            causal=False,
            **shape,
        )

    def _load_kernels(self) -> None:
        """Compiles what is compiled at first use, not in a step that somebody waits for."""
        scratch = self._scratch
        lse, shared_lse = scratch.lse.zero_(), scratch.shared_lse.zero_()
        merge_attention(scratch.out.zero_(), lse, scratch.out, shared_lse)
        one, page = np.ones(1, np.intp), np.zeros(1, np.int32)
        last_page_len = torch.ones(1, dtype=torch.int32)
        self._decode.plan(PageLists(indptr_of(one), page, last_page_len))
        self._plan_groups(np.arange(2), one, page, most_rows=1)
