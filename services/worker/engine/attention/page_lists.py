"""The pages that rows see, as the paged kernels want them: row after row, on the host.

Shapes: S rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.batch import Int32Array


@dataclass(frozen=True, slots=True)
class PageLists:
    """The visible pages of some rows, in FlashInfer's terms; on the host."""

    # [S + 1] first entry of each row in `indices`.
    indptr: torch.Tensor
    # Page ids, row after row.
    indices: Int32Array
    # [S] tokens on each row's last page.
    last_page_len: torch.Tensor


def page_lists(
    inputs: AttentionInputs,
    rows: slice,
    page_size: int,
    num_skipped: npt.NDArray[np.intp] | None = None,
) -> PageLists:
    """All pages up to each row's newest token, but for the first `num_skipped` [S] of each."""
    ends = inputs.start_positions[rows] + inputs.num_tokens[rows]
    num_pages = (ends + (page_size - 1)) // page_size
    last_page_len = torch.from_numpy(ends - (num_pages - 1) * page_size)
    slots, table = inputs.slots[rows], inputs.host_page_table
    if num_skipped is None:
        width = int(num_pages.max())
        pages = table[slots, :width]
        indices = pages[np.arange(width) < num_pages[:, None]]
        return PageLists(indptr_of(num_pages), indices, last_page_len)
    lengths = num_pages - num_skipped
    indptr = indptr_of(lengths)
    starts = slots.astype(np.intp) * table.shape[1] + num_skipped - indptr.numpy()[:-1]
    indices = table.reshape(-1)[np.arange(int(indptr[-1])) + np.repeat(starts, lengths)]
    return PageLists(indptr, indices, last_page_len)


def indptr_of(lengths: npt.NDArray[np.integer]) -> torch.Tensor:
    """[S] -> [S + 1] int32: where each row starts, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return torch.from_numpy(starts)
