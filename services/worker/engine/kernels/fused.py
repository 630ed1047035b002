"""Elementwise work of a decoder layer in one launch each, in Triton, for 16-bit types.

Sums and products are in float32; what the torch path rounds before a weight or a gate is applied
is rounded here too.

Shapes: T tokens, E hidden size, F intermediate size, H query heads, K key/value heads, D head
size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.dependent_launch import (
    allow_dependents,
    launch_options,
    wait_for_predecessors,
)

_COLUMNS = 1024
# Heads of a program.
_HEADS = 4


@triton.jit
def _norm(
    x, residual, weight, out, eps, size, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if DEPENDENT:
        allow_dependents()
    factors = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        wait_for_predecessors()
    values = tl.load(x + row + columns, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row + columns, inside, other=0.0).to(tl.float32)
        total = values.to(x.dtype.element_ty)
        tl.store(x + row + columns, total, inside)
        values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / size + eps)
    normed = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    normed *= factors
    tl.store(out + row + columns, normed.to(x.dtype.element_ty), inside)


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        allow_dependents()
        wait_for_predecessors()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, inside).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, (activated * up).to(out.dtype.element_ty), inside)


@triton.jit
def _norm_heads(first, second, weight, columns, HALF: tl.constexpr, eps):
    """Both halves of [HEADS, PADDED] heads after the norm, rounded as the torch path does."""
    inside = columns < HALF
    squares = tl.sum(first * first + second * second, axis=1)[:, None]
    scale = tl.rsqrt(squares / (2 * HALF) + eps)
    dtype = weight.dtype.element_ty
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    first = ((first * scale).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
    w = tl.load(weight + HALF + columns, inside, other=0.0).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _store(target, numbers, inside, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """Numbers rounded to DTYPE, and then to what a smaller type of the target can hold."""
    rounded = numbers.to(DTYPE)
    if LARGEST is not None:
        rounded = tl.minimum(tl.maximum(rounded.to(tl.float32), -LARGEST), LARGEST)
    tl.store(target, rounded.to(target.dtype.element_ty), inside)


@triton.jit
def _rotate_heads(
    source, target, cos, sin, weight, eps, first_head, num_heads, HALF: tl.constexpr,
    PADDED: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Heads from `first_head` on, of `num_heads` of one token that lie side by side."""
    heads = first_head + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    inside = (heads < num_heads) & (columns < HALF)
    offsets = heads * (2 * HALF) + columns
    first = tl.load(source + offsets, inside, other=0.0).to(tl.float32)
    second = tl.load(source + offsets + HALF, inside, other=0.0).to(tl.float32)
    c = tl.load(cos + columns, columns < HALF).to(tl.float32)
    s = tl.load(sin + columns, columns < HALF).to(tl.float32)
    if HAS_NORM:
        first, second = _norm_heads(first, second, weight, columns, HALF, eps)
    dtype = source.dtype.element_ty
    _store(target + offsets, first * c - second * s, inside, dtype, LARGEST)
    _store(target + offsets + HALF, second * c + first * s, inside, dtype, LARGEST)


@triton.jit
def _copy_heads(
    source, target, first_head, num_heads, HALF: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    heads = first_head + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, 2 * PADDED)[None, :]
    inside = (heads < num_heads) & (columns < 2 * HALF)
    offsets = heads * (2 * HALF) + columns
    numbers = tl.load(source + offsets, inside)
    _store(target + offsets, numbers, inside, source.dtype.element_ty, LARGEST)


@triton.jit
def _rotate_and_write(
    qkv, cos, sin, queries, keys, values, locations, query_weight, key_weight, stride, eps,
    NUM_QUERIES: tl.constexpr, NUM_KEYS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, HAS_NORM: tl.constexpr, LARGEST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Up to HEADS heads of one token, all of a kind: queries come first, values last."""
    if DEPENDENT:
        allow_dependents()
        wait_for_predecessors()
    size: tl.constexpr = 2 * HALF
    query_blocks: tl.constexpr = (NUM_QUERIES + HEADS - 1) // HEADS
    key_blocks: tl.constexpr = (NUM_KEYS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    source = qkv + token * stride
    angles = token * HALF
    if block < query_blocks:
        _rotate_heads(
            source, queries + token * (NUM_QUERIES * size), cos + angles, sin + angles,
            query_weight, eps, block * HEADS, NUM_QUERIES, HALF, PADDED, HEADS, HAS_NORM, None,
        )  # fmt: skip
    else:
        place = tl.load(locations + token) * (NUM_KEYS * size)
        if block < query_blocks + key_blocks:
            _rotate_heads(
                source + NUM_QUERIES * size, keys + place, cos + angles, sin + angles,
                key_weight, eps, (block - query_blocks) * HEADS, NUM_KEYS, HALF, PADDED, HEADS,
                HAS_NORM, LARGEST,
            )  # fmt: skip
        else:
            _copy_heads(
                source + (NUM_QUERIES + NUM_KEYS) * size, values + place,
                (block - query_blocks - key_blocks) * HEADS, NUM_KEYS, HALF, PADDED, HEADS,
                LARGEST,
            )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, E], contiguous -> its norm."""
    out = torch.empty_like(x)
    size = x.shape[1]
    _norm[(len(x),)](
        x, x, weight, out, eps, size, HAS_RESIDUAL=False, BLOCK=triton.next_power_of_2(size),
        num_warps=8, **launch_options(x.device),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """[T, E], contiguous -> the norm of x + residual; `x` becomes that sum."""
    out = torch.empty_like(x)
    size = x.shape[1]
    _norm[(len(x),)](
        x, residual, weight, out, eps, size, HAS_RESIDUAL=True,
        BLOCK=triton.next_power_of_2(size), num_warps=8, **launch_options(x.device),
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 F], contiguous -> silu of the first half times the second, [T, F]."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    _silu_mul[(num_tokens, triton.cdiv(size, _COLUMNS))](
        gate_up, out, size, BLOCK=_COLUMNS, **launch_options(gate_up.device)
    )
    return out


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    locations: torch.Tensor,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Heads of queries, keys and values side by side [T, (H + 2 K) D] -> rotated queries [T, H, D].

    Rotated keys, and values, go to places [T] of the pool's layer, `keys` and `values` [pages, page
    size, K, D], each contiguous; what an FP8 pool cannot hold becomes its largest value of that
    sign. cos and sin are [T, 1, D / 2]. With `norm_weights`, those of queries and of keys, heads
    are normed before they are rotated.
    """
    num_keys, head_dim = keys.shape[2:]
    num_tokens, half = len(qkv), head_dim // 2
    num_queries = qkv.shape[1] // head_dim - 2 * num_keys
    query_weight, key_weight = (qkv, qkv) if norm_weights is None else norm_weights
    queries = qkv.new_empty(num_tokens, num_queries, head_dim)
    blocks = triton.cdiv(num_queries, _HEADS) + 2 * triton.cdiv(num_keys, _HEADS)
    _rotate_and_write[(num_tokens, blocks)](
        qkv, cos, sin, queries, keys, values, locations, query_weight, key_weight, qkv.stride(0),
        eps, NUM_QUERIES=num_queries, NUM_KEYS=num_keys, HALF=half,
        PADDED=triton.next_power_of_2(half), HEADS=_HEADS, HAS_NORM=norm_weights is not None,
        LARGEST=torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else None,
        num_warps=2, **launch_options(qkv.device),
    )  # fmt: skip
    return queries
