"""Products of a weight matrix with few rows, at the speed at which memory gives the weights.

y = x W^T for up to MAX_TOKENS rows of x, sums in float32. What stands around such a product in a
decoder is done in the same launch: the norm of x before it (its scale is applied to the sums, so
x is read once), and after it the bias, the gated activation or the residual's addition. Weights
may be float8 with one float32 scale per output.

On GPUs that have it, kernels start while their predecessor still runs (programmatic dependent
launch): weights do not depend on it, so they are on their way to the L2 cache before the wait.

Shapes: T tokens, K input features, N output features, F = N / 2 of a gated layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.dependent_launch import (
    allow_dependents,
    can_launch_dependents,
    prefetch_to_l2,
    wait_for_predecessors,
)

MAX_TOKENS = 32
# Bytes of a row of weights must be whole 16-byte loads.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Norm:
    """The RMS norm that is applied to x."""

    # [K]
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `rows` rows of W, `block` columns at a time."""

    rows: int
    block: int
    num_warps: int
    num_stages: int = 1


@triton.jit
def _prefetch_rows(weight, program, num_rows, K: tl.constexpr, ROWS: tl.constexpr,
                   GATED: tl.constexpr):  # fmt: skip
    row_bytes: tl.constexpr = K * weight.dtype.element_ty.primitive_bitwidth // 8
    if GATED:
        half: tl.constexpr = ROWS // 2
        first = program * half
        count = tl.minimum(num_rows // 2 - first, half)
        prefetch_to_l2(weight + first.to(tl.int64) * K, count * row_bytes)
        prefetch_to_l2(weight + (num_rows // 2 + first).to(tl.int64) * K, count * row_bytes)
    else:
        first = program * ROWS
        count = tl.minimum(num_rows - first, ROWS)
        prefetch_to_l2(weight + first.to(tl.int64) * K, count * row_bytes)


@triton.jit
def _finish(
    sums, squares, index, rows, scale, bias, residual, out, eps, num_tokens, num_rows,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Turn [TOKENS, ROWS] sums into outputs and store them."""
    inside = index < num_rows
    if HAS_SCALE:
        sums *= tl.load(scale + rows, inside, other=0.0)[None, :]
    if HAS_NORM:
        sums *= tl.rsqrt(squares / K + eps)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + rows, inside, other=0.0).to(tl.float32)[None, :]
    tokens = tl.arange(0, TOKENS)[:, None]
    num_columns = num_rows
    columns = index[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(sums, (TOKENS, ROWS // 2, 2)))
        sums = gate * tl.sigmoid(gate) * up
        num_columns = num_rows // 2
        columns = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)[None, :]
    inside = (tokens < num_tokens) & (columns < num_columns)
    offsets = tokens.to(tl.int64) * num_columns + columns
    if HAS_RESIDUAL:
        sums += tl.load(residual + offsets, inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, sums.to(out.dtype.element_ty), inside)


@triton.jit
def _one_token(
    x, x_stride, weight, norm_weight, scale, bias, residual, out, eps, num_tokens, num_rows,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """T = 1: every thread multiplies and adds its own columns; they meet at the end."""
    program = tl.program_id(0)
    index = program * ROWS + tl.arange(0, ROWS)
    # Of a gated layer, rows of gate and up alternate, so that a pair is in one program.
    rows = (index % 2) * (num_rows // 2) + index // 2 if GATED else index
    # Eight columns a thread, 16 bytes of x, also where 16 bytes of W are more: else x would
    # have to change threads.
    columns = tl.max_contiguous(tl.arange(0, BLOCK), 8)[None, :]
    tile = weight + rows.to(tl.int64)[:, None] * K + columns
    inside = index[:, None] < num_rows
    if DEPENDENT:
        allow_dependents()
        if PREFETCH:
            _prefetch_rows(weight, program, num_rows, K, ROWS, GATED)
    following = tl.load(tile, inside & (columns < K), other=0.0, eviction_policy="evict_first")
    if DEPENDENT:
        wait_for_predecessors()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        current = following
        if start + BLOCK < K:
            following = tl.load(
                tile + (start + BLOCK), inside & (start + BLOCK + columns < K), other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        within = start + columns < K
        values = tl.load(x + start + columns, within, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm_weight + start + columns, within, other=0.0).to(tl.float32)
        total += current.to(tl.float32) * values
    _finish(
        tl.sum(total, axis=1)[None, :], tl.sum(squares, axis=1), index, rows, scale, bias,
        residual, out, eps, num_tokens, num_rows, K, TOKENS, ROWS, GATED, HAS_NORM, HAS_SCALE,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _few_tokens(
    x, x_stride, weight, norm_weight, scale, bias, residual, out, eps, num_tokens, num_rows,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """T up to TOKENS: matrix instructions over rows padded to TOKENS."""
    program = tl.program_id(0)
    index = program * ROWS + tl.arange(0, ROWS)
    rows = (index % 2) * (num_rows // 2) + index // 2 if GATED else index
    columns = tl.arange(0, BLOCK)[None, :]
    tile = weight + rows.to(tl.int64)[:, None] * K + columns
    inside = index[:, None] < num_rows
    if DEPENDENT:
        allow_dependents()
        if PREFETCH:
            _prefetch_rows(weight, program, num_rows, K, ROWS, GATED)
        wait_for_predecessors()
    tokens = tl.arange(0, TOKENS)[:, None]
    source = x + tokens.to(tl.int64) * x_stride + columns
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        within = start + columns < K
        block = tl.load(
            tile + start, inside & within, other=0.0, eviction_policy="evict_first"
        )  # fmt: skip
        values = tl.load(source + start, (tokens < num_tokens) & within, other=0.0)
        if HAS_NORM:
            wide = values.to(tl.float32)
            squares += wide * wide
            factors = tl.load(norm_weight + start + columns, within, other=0.0).to(tl.float32)
            values = (wide * factors).to(values.dtype)
        total = tl.dot(values, tl.trans(block.to(values.dtype)), total)
    _finish(
        total, tl.sum(squares, axis=1), index, rows, scale, bias, residual, out, eps,
        num_tokens, num_rows, K, TOKENS, ROWS, GATED, HAS_NORM, HAS_SCALE, HAS_BIAS,
        HAS_RESIDUAL,
    )  # fmt: skip


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these kernels compute this product; shapes and types only, not speed."""
    return (
        1 <= len(x) <= MAX_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.shape[1] * weight.itemsize % _ALIGNMENT == 0
    )


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x [T, K], rows contiguous; weight [N, K] -> [T, N].

    `weight` is of x's type or, with `scale` [N] in float32, float8_e4m3fn. `residual` [T, N] is
    added last.
    """
    out = x.new_empty(len(x), len(weight), dtype=out_dtype)
    _launch(x, weight, bias, scale, norm, residual, out, tile, gated=False)
    return out


def gated_matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    norm: Norm | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """As `matvec`, of gate (the first F rows) and up: silu(gate) * up, [T, F]."""
    out = x.new_empty(len(x), len(weight) // 2)
    _launch(x, weight, bias, scale, norm, None, out, tile, gated=True)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    norm: Norm | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile | None,
    *,
    gated: bool,
) -> None:
    num_tokens, (num_rows, size) = len(x), weight.shape
    tile = tile or choose_tile(num_tokens, num_rows, size, weight.itemsize)
    dependent = can_launch_dependents(x.device)
    kernel = _one_token if num_tokens == 1 else _few_tokens
    kernel[(triton.cdiv(num_rows, tile.rows),)](
        x, x.stride(0), weight, x if norm is None else norm.weight,
        x if scale is None else scale, x if bias is None else bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps,
        num_tokens, num_rows, K=size, TOKENS=1 if num_tokens == 1 else 16 * -(-num_tokens // 16),
        ROWS=tile.rows, BLOCK=tile.block, STAGES=tile.num_stages, GATED=gated,
        HAS_NORM=norm is not None, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, PREFETCH=True, DEPENDENT=dependent,
        num_warps=tile.num_warps, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


@functools.cache
def choose_tile(num_tokens: int, num_rows: int, size: int, itemsize: int) -> Tile:
    """The tile that won for such a product on an H100."""
    if num_tokens == 1:
        return Tile(rows=4 if num_rows <= 8192 else 8, block=2048 // itemsize, num_warps=4)
    return Tile(rows=32 if num_rows >= 4096 else 16, block=256, num_warps=4, num_stages=4)
