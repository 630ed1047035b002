"""What the paged attention kernels share: addresses in the pool, scores, weighted values.

Scores are in units of log2, so that softmax takes exp2 (Dao et al., FlashAttention,
arXiv 2205.14135, section 3.1, for the running maximum and sum). Products of float32 inputs are
in float32, never in TF32.

Shapes: M query rows (tokens times heads), N keys, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Far below every score, but finite: a row that sees nothing of a block gets no NaN, and what it
# gathered there is multiplied by exp2(-1e30 - ...) = 0 once it sees something.
HIDDEN = tl.constexpr(-1e30)
LOG2_E = math.log2(math.e)
# Probabilities in float32 have 24 bits: three parts of bfloat16's 8, or of float16's 11, hold them.
_EXACT_PARTS = 3


@triton.jit
def load_block(
    pool, table, positions, kv_head, valid, dtype: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values at `positions` of one sequence, [N, D]; zeros where not `valid`."""
    columns = tl.arange(0, BLOCK_D)
    if MASKED:
        pages = tl.load(table + positions // PAGE, valid, other=0).to(tl.int64)
    else:
        pages = tl.load(table + positions // PAGE).to(tl.int64)
    tokens = pages * PAGE + positions % PAGE
    offsets = (tokens * KV_HEADS + kv_head)[:, None] * HEAD_DIM + columns[None, :]
    if MASKED:
        inside = valid[:, None] & (columns < HEAD_DIM)[None, :]
        block = tl.load(pool + offsets, inside, other=0.0)
    elif BLOCK_D == HEAD_DIM:
        block = tl.load(pool + offsets)
    else:
        inside = tl.broadcast_to((columns < HEAD_DIM)[None, :], offsets.shape)
        block = tl.load(pool + offsets, inside, other=0.0)
    return block.to(dtype)


@triton.jit
def score(q, k, scale, soft_cap, HAS_CAP: tl.constexpr):
    """[M, D] and [N, D] -> [M, N]; factors as `Softmax` gives them."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_CAP:
        # tanh by exp2 of a number that is never positive, which cannot overflow.
        decay = tl.exp2(-2.8853900817779268 * tl.abs(scores))
        size = (1.0 - decay) / (1.0 + decay)
        scores = soft_cap * tl.where(scores < 0, -size, size)
    return scores


@triton.jit
def accumulate(acc, total, top, scores, v, PARTS: tl.constexpr):
    """One more block of keys: [M, D] sums, [M] sums and maxima, [M, N] scores, [N, D] values.

    Probabilities take part as PARTS numbers of the values' type, each what the ones before it
    left over (Markidis et al., arXiv 1803.04014, section V).
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    for _ in tl.static_range(PARTS - 1):
        part = weights.to(v.dtype)
        acc = tl.dot(part, v, acc, input_precision="ieee")
        weights -= part.to(tl.float32)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_top


@dataclass(frozen=True, slots=True)
class Softmax:
    """A layer's factors as the kernels take them."""

    # Products of queries and keys to scores in log2, or to the argument of tanh.
    scale: float
    # tanh to scores in log2; 0 where there is no cap.
    soft_cap: float
    # Positions that a token sees, itself included.
    window: int

    @classmethod
    def of(cls, scale: float, soft_cap: float | None, window: int | None) -> Softmax:
        """From a layer's constants."""
        # More than any position, and subtracting it from one does not overflow.
        seen = 2**30 if window is None else window
        if soft_cap is None:
            return cls(scale * LOG2_E, 0.0, seen)
        return cls(scale / soft_cap, soft_cap * LOG2_E, seen)


def heads_of_program(group: int, most: int) -> int:
    """Query heads that a program takes of a group: all, or parts as equal as can be."""
    return int(triton.cdiv(group, triton.cdiv(group, most)))


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: dot products need 16 or more, and a power of two."""
    return max(16, triton.next_power_of_2(head_dim))


def parts_of_weights(dtype: torch.dtype, *, in_fp32: bool) -> int:
    """`PARTS` for values of this type."""
    return _EXACT_PARTS if in_fp32 and dtype != torch.float32 else 1
