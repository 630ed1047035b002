"""Page lists of rows, whole and without their first pages."""

import numpy as np
import torch

from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.attention.page_lists import indptr_of, page_lists


def make_inputs(random: np.random.Generator, page_size: int, num_rows: int) -> AttentionInputs:
    table = random.permutation(20 * 30).reshape(20, 30).astype(np.int32)
    lengths = random.integers(1, 30 * page_size, num_rows)
    num_tokens = np.minimum(random.integers(1, 9, num_rows), lengths)
    return AttentionInputs(
        slots=random.permutation(20)[:num_rows].astype(np.int32),
        num_tokens=num_tokens.astype(np.int32),
        start_positions=(lengths - num_tokens).astype(np.int32),
        host_page_table=table,
        page_table=torch.from_numpy(table),
    )


def test_lists_hold_every_visible_page_of_every_row() -> None:
    random = np.random.default_rng(1)
    for page_size in (1, 3, 16):
        inputs = make_inputs(random, page_size, 12)
        skipped = random.integers(0, 3, 12)
        ends = inputs.start_positions + inputs.num_tokens
        skipped = np.minimum(skipped, (ends - 1) // page_size).astype(np.intp)
        for rows, num_skipped in ((slice(2, 9), None), (slice(0, 12), skipped)):
            lists = page_lists(inputs, rows, page_size, num_skipped)
            firsts = np.zeros(12, int) if num_skipped is None else num_skipped
            expected = [
                inputs.host_page_table[inputs.slots[row], firsts[row] : -(-ends[row] // page_size)]
                for row in range(12)[rows]
            ]
            assert lists.indices.tolist() == np.concatenate(expected).tolist()
            assert lists.indptr.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
            last = [(int(end) - 1) % page_size + 1 for end in ends[rows]]
            assert lists.last_page_len.tolist() == last


def test_indptr_starts_at_0_and_ends_at_the_sum() -> None:
    starts = indptr_of(np.array([3, 0, 2]))
    assert starts.tolist() == [0, 3, 3, 5]
    assert starts.dtype == torch.int32
