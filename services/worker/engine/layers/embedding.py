"""Token embedding and output head, divided among the ranks by vocabulary.

Shapes: T tokens, R rows, E hidden size, V vocabulary, W this rank's share of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.worker.engine.layers.parameters import Placement, StoredTensor
from services.worker.engine.layers.products import (
    has_few_token_kernels,
    multiply,
    multiply_unrounded,
)

_ID_BITS = 0xFFFFFFFF
_MAGNITUDE_BITS = 0x7FFFFFFF
_SMALLEST_KEY = -(2**63)


class VocabularyShard:
    """This rank's rows of a [V, E] matrix; the last rank's are padded with zeros.

    Embedding and output head may share one (tied embeddings), stored as suits an embedding.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        placement: Placement,
        *,
        is_head: bool = False,
    ) -> None:
        self._name = name
        self._shape = (vocab_size, hidden_size)
        self.vocab_size = vocab_size
        self.group = placement.group
        self.num_ids = -(-vocab_size // placement.group.size)
        self.first_id = placement.group.rank * self.num_ids
        empty = placement.empty_matrix if is_head else placement.empty
        self.weight = empty(self.num_ids, hidden_size)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {self._name: self._shape}

    def load(self, name: str, tensor: StoredTensor) -> None:
        rows = tensor[self.first_id : self.first_id + self.num_ids]
        self.weight[: len(rows)].copy_(rows)
        self.weight[len(rows) :].zero_()


def embed(shard: VocabularyShard, token_ids: torch.Tensor) -> torch.Tensor:
    """[T] -> [T, E]"""
    if shard.group.size == 1:
        return F.embedding(token_ids, shard.weight)
    local = token_ids - shard.first_id
    outside = (local < 0) | (local >= shard.num_ids)
    hidden = F.embedding(local.masked_fill(outside, 0), shard.weight)
    return shard.group.all_reduce(hidden.masked_fill_(outside[:, None], 0))


def compute_logits(shard: VocabularyShard, hidden: torch.Tensor) -> torch.Tensor:
    """[R, E] -> [R, V], whole on every rank, in one of `logits_dtypes`.

    Wider copies would hold the same values and be read at half the speed.
    """
    if shard.group.size == 1:
        return multiply_unrounded(hidden, shard.weight)
    # Ranks send 16 bits where the model has them.
    logits = multiply(hidden, shard.weight)
    return shard.group.all_gather(logits)[:, : shard.vocab_size].contiguous()


def logits_dtypes(shard: VocabularyShard) -> tuple[torch.dtype, ...]:
    """The types that logits may have: the model's, and float32 where few rows are not rounded."""
    dtype = shard.weight.dtype
    if shard.group.size == 1 and has_few_token_kernels(shard.weight.device, dtype):
        return (dtype, torch.float32)
    return (dtype,)


def compute_largest(shard: VocabularyShard, hidden: torch.Tensor) -> torch.Tensor:
    """[R, E] -> ids of the largest logits, [R]; of equal ones the first.

    Each rank sends one number a row: the largest of its logits in the upper half, with bits turned
    such that integers compare as the floats did, and the complement of its id in the lower half.
    """
    num_ids = min(shard.num_ids, max(0, shard.vocab_size - shard.first_id))
    keys = torch.full((len(hidden), 1), _SMALLEST_KEY, dtype=torch.int64, device=hidden.device)
    if num_ids:
        values, ids = multiply(hidden, shard.weight)[:, :num_ids].max(-1, keepdim=True)
        # Adding zero makes the two zeros one.
        bits = values.float().add_(0.0).view(torch.int32)
        ordered = bits ^ ((bits >> 31) & _MAGNITUDE_BITS)
        keys = (ordered.long() << 32) | (_ID_BITS - (ids + shard.first_id))
    return _ID_BITS - (shard.group.all_gather(keys).amax(-1) & _ID_BITS)
