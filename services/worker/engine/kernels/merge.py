"""Attention over two disjoint sets of keys made attention over both, in Triton.

With o the output over a set and s the logarithm of its sum of exponentials, the output over both
is (2^s o + 2^s' o') / (2^s + 2^s') (Milakov and Gimelshein, arXiv 1805.02867, for the running sum;
FlashInfer, arXiv 2501.01005, section 2.2, for merging). Logarithms are to base 2.

Shapes: S rows, H heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 8


@triton.jit
def _merge(
    out, out_lse, other, other_lse, num_heads,
    SIZE: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, PADDED)[None, :]
    has_head = heads < num_heads
    own = tl.load(out_lse + row * num_heads + heads, has_head, other=0.0)
    added = tl.load(other_lse + row * num_heads + heads, has_head, other=0.0)
    # Nothing was added where a row has no keys in the other set: its sum is 0.
    share = (1.0 / (1.0 + tl.exp2(own - added)))[:, None]
    inside = has_head[:, None] & (columns < SIZE)
    offsets = (row * num_heads + heads[:, None]) * SIZE + columns
    mine = tl.load(out + offsets, inside).to(tl.float32)
    theirs = tl.load(other + offsets, inside & (share > 0.0), other=0.0).to(tl.float32)
    merged = mine + share * (theirs - mine)
    tl.store(out + offsets, merged.to(out.dtype.element_ty), inside)


def merge_attention(
    out: torch.Tensor, out_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """`out` [S, H, D] over one set of keys becomes that over both; all contiguous.

    The base-2 log-sums [S, H] are float32; `other_lse` may be -inf, then `other` is not read.
    """
    num_rows, num_heads, size = out.shape
    _merge[(num_rows, triton.cdiv(num_heads, _HEADS))](
        out, out_lse, other, other_lse, num_heads, SIZE=size,
        PADDED=triton.next_power_of_2(size), HEADS=_HEADS,
    )  # fmt: skip
