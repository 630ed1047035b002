"""Elementwise work of a decoder layer in one launch each, in Triton, for 16-bit types.

Sums and products are in float32; what the torch path rounds before a weight or a gate is applied
is rounded here too.

Shapes: T tokens, E hidden size, F intermediate size, N heads, D head size, K key/value heads.
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
def _rotate(
    x, cos, sin, out, query_norm, key_norm, x_stride, num_heads, num_queries, eps,
    HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        allow_dependents()
        wait_for_predecessors()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    inside = (heads < num_heads) & (columns < HALF)
    c = tl.load(cos + token * HALF + columns, columns < HALF).to(tl.float32)
    s = tl.load(sin + token * HALF + columns, columns < HALF).to(tl.float32)
    offsets = heads * (2 * HALF) + columns
    source = x + token * x_stride + offsets
    target = out + token * num_heads * (2 * HALF) + offsets
    first = tl.load(source, inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        is_query = heads < num_queries
        query = _norm_heads(first, second, query_norm, columns, HALF, eps)
        key = _norm_heads(first, second, key_norm, columns, HALF, eps)
        first = tl.where(is_query, query[0], key[0])
        second = tl.where(is_query, query[1], key[1])
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), inside)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), inside)


@triton.jit
def _write(
    k, v, keys, values, locations, k_stride, v_stride, size, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        allow_dependents()
        wait_for_predecessors()
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(locations + token) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    new_keys = tl.load(k + token * k_stride + columns, inside)
    new_values = tl.load(v + token * v_stride + columns, inside)
    if LARGEST is not None:
        new_keys = tl.minimum(tl.maximum(new_keys.to(tl.float32), -LARGEST), LARGEST)
        new_values = tl.minimum(tl.maximum(new_values.to(tl.float32), -LARGEST), LARGEST)
    tl.store(keys + target + columns, new_keys.to(keys.dtype.element_ty), inside)
    tl.store(values + target + columns, new_values.to(values.dtype.element_ty), inside)


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


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, N, D], heads side by side -> the same rotated, contiguous; cos, sin [T, 1, D / 2]."""
    return _rotated(x, cos, sin, x, x, 0, 0.0, has_norm=False)


def norm_rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    num_queries: int,
    eps: float,
) -> torch.Tensor:
    """The same after a norm of each head: the first `num_queries` are queries, others keys."""
    return _rotated(x, cos, sin, query_weight, key_weight, num_queries, eps, has_norm=True)


def _rotated(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    num_queries: int,
    eps: float,
    *,
    has_norm: bool,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = head_dim // 2
    _rotate[(num_tokens, triton.cdiv(num_heads, _HEADS))](
        x, cos, sin, out, query_weight, key_weight, x.stride(0), num_heads, num_queries, eps,
        HALF=half, PADDED=triton.next_power_of_2(half), HEADS=_HEADS, HAS_NORM=has_norm,
        **launch_options(x.device),
    )  # fmt: skip
    return out


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    locations: torch.Tensor,
) -> None:
    """[T, K, D] keys and values to places [T] of the pool's layer, [pages, page size, K, D].

    What an FP8 pool cannot hold becomes its largest value of that sign.
    """
    size = keys.shape[2] * keys.shape[3]
    largest = torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else None
    _write[(len(locations),)](
        k, v, keys, values, locations, k.stride(0), v.stride(0), size, LARGEST=largest,
        BLOCK=triton.next_power_of_2(size), **launch_options(k.device),
    )  # fmt: skip
