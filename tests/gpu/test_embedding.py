"""The output head on a GPU: logits keep the type of the product, of equal ones the first wins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from services.worker.engine.distributed.group import SoloGroup
from services.worker.engine.layers.embedding import (
    VocabularyShard,
    compute_largest,
    compute_logits,
    logits_dtypes,
)
from services.worker.engine.layers.parameters import Placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCAB_SIZE, HIDDEN_SIZE = 5000, 1024


def head(dtype: torch.dtype, weight: torch.Tensor) -> VocabularyShard:
    placement = Placement(torch.device("cuda"), dtype, SoloGroup())
    shard = VocabularyShard("head", VOCAB_SIZE, HIDDEN_SIZE, placement, is_head=True)
    shard.load("head", weight)
    return shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_many_rows_are_what_cublas_gives(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    shard = head(dtype, torch.randn(VOCAB_SIZE, HIDDEN_SIZE))
    hidden = torch.randn(64, HIDDEN_SIZE, dtype=dtype, device="cuda")
    assert torch.equal(compute_logits(shard, hidden), F.linear(hidden, shard.weight))
    found = {compute_logits(shard, hidden[:rows]).dtype for rows in (1, 32, 33, 64)}
    assert found == set(logits_dtypes(shard)) == {dtype, torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equal_logits_the_first_is_the_largest(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    # Small integers, so that sums are exact and equal logits are common.
    shard = head(dtype, torch.randint(-1, 2, (VOCAB_SIZE, HIDDEN_SIZE)).float())
    hidden = torch.zeros(64, HIDDEN_SIZE, dtype=dtype, device="cuda")
    hidden[:, :8] = torch.randint(-1, 2, (64, 8), device="cuda").to(dtype)
    logits = (hidden @ shard.weight.T).float().cpu()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert compute_largest(shard, hidden).tolist() == expected
