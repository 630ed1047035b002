"""Products of a weight matrix with few rows, at the speed at which memory gives the weights.

y = x W^T for up to MAX_TOKENS rows of x (MAX_GATED_TOKENS of a gated layer, whose activation saves
another launch), sums in float32. What stands around such a product in a
decoder is done in the same launch: for one token the norm of x before it (its scale is applied to
the sums, so x is read once), and after it the bias, the gated activation or the residual's
addition. Weights may be float8 with one float32 scale per output.

Kernels start while their predecessor still runs where the GPU can do that: for one token the
first weights are then on their way before the wait, since they do not depend on it.

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
    launch_options,
    wait_for_predecessors,
)

MAX_TOKENS, MAX_GATED_TOKENS = 32, 64
# Fewer outputs than this are too few programs to keep the memory busy: smaller tiles for one
# token, cuBLAS (which divides K as well) for several.
_MIN_ROWS = 4096
# Shared memory that the tiles of several tokens fill at most, at MAX_TOKENS.
SHARED_BYTES = 192 * 1024
# Features are read 16 at a time, which aligns every row for the widest loads.
_FEATURE_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `rows` rows of W, `block` columns at a time."""

    rows: int
    block: int
    num_warps: int
    num_stages: int = 1


@triton.jit
def _rows_of(program, num_rows, ROWS: tl.constexpr, GATED: tl.constexpr):
    """A program's rows of W; of a gated layer gate and up alternate, so that pairs stay together.

    Beyond the last row it is the last one: its sums are not stored.
    """
    index = tl.minimum(program * ROWS + tl.arange(0, ROWS), num_rows - 1)
    if GATED:
        index = (index % 2) * (num_rows // 2) + index // 2
    return index.to(tl.int64)


@triton.jit
def _finish(
    sums, squares, rows, scale, bias, residual, out, eps, num_tokens, num_rows,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Turn [TOKENS, ROWS] sums into outputs and store them."""
    if HAS_SCALE:
        sums *= tl.load(scale + rows)[None, :]
    if HAS_NORM:
        sums *= tl.rsqrt(squares / K + eps)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + rows).to(tl.float32)[None, :]
    tokens = tl.arange(0, TOKENS)[:, None]
    if GATED:
        gate, up = tl.split(tl.reshape(sums, (TOKENS, ROWS // 2, 2)))
        sums = gate * tl.sigmoid(gate) * up
        num_columns = num_rows // 2
        columns = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)[None, :]
    else:
        num_columns = num_rows
        columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = (tokens < num_tokens) & (columns < num_columns)
    offsets = tokens.to(tl.int64) * num_columns + columns
    if HAS_RESIDUAL:
        sums += tl.load(residual + offsets, inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, sums.to(out.dtype.element_ty), inside)


@triton.jit
def _load_weights(tile, columns, start: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    if start + BLOCK > K:
        within = start + columns < K
        return tl.load(tile + start, within, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(tile + start, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_tokens"])
def _one_token(
    x, x_stride, weight, norm_weight, scale, bias, residual, out, eps, num_tokens, num_rows,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """T = 1: every thread multiplies and adds its own columns; they meet at the end."""
    rows = _rows_of(tl.program_id(0), num_rows, ROWS, GATED)
    # Eight columns a thread, 16 bytes of x, also where 16 bytes of W are more: else x would
    # have to change threads.
    columns = tl.max_contiguous(tl.arange(0, BLOCK), 8)[None, :]
    tile = weight + rows[:, None] * K + columns
    if DEPENDENT:
        allow_dependents()
    following = _load_weights(tile, columns, 0, K, BLOCK)
    if DEPENDENT:
        wait_for_predecessors()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        current = following
        if start + BLOCK < K:
            following = _load_weights(tile, columns, start + BLOCK, K, BLOCK)
        within = start + columns < K
        values = tl.load(x + start + columns, within, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm_weight + start + columns, within, other=0.0).to(tl.float32)
        total += current.to(tl.float32) * values
    _finish(
        tl.sum(total, axis=1)[None, :], tl.sum(squares, axis=1), rows, scale, bias, residual, out,
        eps, num_tokens, num_rows, K, TOKENS, ROWS, GATED, HAS_NORM, HAS_SCALE, HAS_BIAS,
        HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _few_tokens(
    x, x_stride, weight, norm_weight, scale, bias, residual, out, eps, num_tokens, num_rows,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """T up to TOKENS: matrix instructions, W's rows being the many that they want."""
    rows = _rows_of(tl.program_id(0), num_rows, ROWS, GATED)
    columns = tl.arange(0, BLOCK)[None, :]
    tokens = tl.arange(0, TOKENS)[:, None]
    tile = weight + rows[:, None] * K + columns
    source = x + tokens.to(tl.int64) * x_stride + columns
    if DEPENDENT:
        allow_dependents()
        wait_for_predecessors()
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        if K % BLOCK == 0:
            block = tl.load(tile + start, eviction_policy="evict_first")
            values = tl.load(source + start, tokens < num_tokens, other=0.0)
        else:
            within = start + columns < K
            block = tl.load(tile + start, within, other=0.0, eviction_policy="evict_first")
            values = tl.load(source + start, (tokens < num_tokens) & within, other=0.0)
        total = tl.dot(block.to(values.dtype), tl.trans(values), total)
    _finish(
        tl.trans(total), total, rows, scale, bias, residual, out, eps, num_tokens, num_rows, K,
        TOKENS, ROWS, GATED, HAS_NORM, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def takes(x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False) -> bool:
    """Whether these kernels compute this product, and faster than cuBLAS does.

    Several tokens: their tiles want the shared memory of a data centre's Hopper GPU or a later
    one, weights of 16 bits, and enough outputs.
    """
    num_rows, size = weight.shape
    if x.dtype.itemsize != 2 or size % _FEATURE_MULTIPLE or not weight.is_contiguous():
        return False
    if len(x) == 1:
        return True
    is_large = num_rows >= _MIN_ROWS and weight.dtype == x.dtype
    most = MAX_GATED_TOKENS if gated else MAX_TOKENS
    return is_large and 1 < len(x) <= most and _has_room(x.device)


@functools.cache
def _has_room(device: torch.device) -> bool:
    """Newer GPUs are not larger ones: compute capability 12.0 has half of 9.0's shared memory."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= SHARED_BYTES)


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, K], rows contiguous; weight [N, K] -> [T, N].

    `weight` is of x's type or, with `scale` [N] in float32, float8_e4m3fn. `residual` [T, N] is
    added last. With `norm_weight` [K], for one token only, x is normed first (RMS norm).
    """
    out = x.new_empty(len(x), len(weight), dtype=out_dtype)
    _launch(x, weight, bias, scale, norm_weight, eps, residual, out, gated=False)
    return out


def gated_matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """As `matvec`, of gate (the first F rows) and up: silu(gate) * up, [T, F]."""
    out = x.new_empty(len(x), len(weight) // 2)
    _launch(x, weight, bias, scale, norm_weight, eps, None, out, gated=True)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    gated: bool,
) -> None:
    num_tokens, (num_rows, size) = len(x), weight.shape
    assert norm_weight is None or num_tokens == 1, "several tokens are normed before"
    tile = choose_tile(num_tokens, num_rows, size)
    kernel = _one_token if num_tokens == 1 else _few_tokens
    kernel[(triton.cdiv(num_rows, tile.rows),)](
        x, x.stride(0), weight, x if norm_weight is None else norm_weight,
        x if scale is None else scale, x if bias is None else bias,
        x if residual is None else residual, out, eps,
        num_tokens, num_rows, K=size,
        TOKENS=1 if num_tokens == 1 else max(16, triton.next_power_of_2(num_tokens)),
        ROWS=tile.rows, BLOCK=tile.block, STAGES=tile.num_stages, GATED=gated,
        HAS_NORM=norm_weight is not None, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, num_warps=tile.num_warps, **launch_options(x.device),
    )  # fmt: skip


@functools.cache
def choose_tile(num_tokens: int, num_rows: int, size: int) -> Tile:
    """The tile that won for such a product on an H100, see bench/results/matvec_gpu.md."""
    if num_tokens > MAX_TOKENS:
        return Tile(rows=64, block=128, num_warps=4, num_stages=3)
    if num_tokens > 1:
        return Tile(rows=64, block=128, num_warps=4, num_stages=8)
    block = min(2048, max(256, triton.next_power_of_2(size)))
    return Tile(rows=4 if num_rows >= _MIN_ROWS else 2, block=block, num_warps=block // 256)
