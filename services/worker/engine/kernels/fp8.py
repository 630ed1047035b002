"""Products of 16-bit activations with FP8 weights, and the quantization that they need, in Triton.

Tokens are multiplied on the FP8 tensor cores, rounded to FP8 with one scale each, where possible
in the launch that makes them. Few tokens are bound by reading the weights, so those are widened in
registers and the activations stay as they are.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.matvec import matvec, takes

# Up to so many tokens, widening the weights beats rounding the activations (on an H100).
FEW_TOKENS = 1
_FP8_MAX = tl.constexpr(448.0)
_MIN_AMAX = tl.constexpr(1e-12)


@triton.jit
def _store_quantized(wide, values, scales, row, columns, inside, size):
    """A row of float32, zero outside, as values and a scale: the reference's operations."""
    amax = tl.maximum(tl.max(tl.abs(wide), 0), _MIN_AMAX)
    scaled = wide * tl.div_rn(_FP8_MAX, amax)
    scaled = tl.minimum(tl.maximum(scaled, -_FP8_MAX), _FP8_MAX)
    tl.store(values + row * size + columns, scaled.to(values.dtype.element_ty), inside)
    tl.store(scales + row, amax * (1 / _FP8_MAX))


@triton.jit
def _quantize(x, values, scales, x_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    _store_quantized(wide, values, scales, row, columns, inside, size)


@triton.jit
def _norm_quantize(
    x, residual, weight, values, scales, eps, size, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + row * size + columns, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row * size + columns, inside, other=0.0).to(tl.float32)
        total = wide.to(x.dtype.element_ty)
        tl.store(x + row * size + columns, total, inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    # Rounded as the norm alone would be, so that fusing changes nothing.
    normed = normed.to(x.dtype.element_ty).to(tl.float32)
    _store_quantized(normed, values, scales, row, columns, inside, size)


@triton.jit
def _silu_mul_quantize(gate_up, values, scales, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    source = gate_up + row * 2 * size + columns
    gate = tl.load(source, inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, inside, other=0.0).to(tl.float32)
    dtype = gate_up.dtype.element_ty
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    product = (activated * up).to(dtype).to(tl.float32)
    _store_quantized(product, values, scales, row, columns, inside, size)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, I] -> values [T, I] in float8_e4m3fn and scales [T, 1] in float32."""
    num_tokens, size = x.shape
    values, scales = _empty_rows(num_tokens, size, x.device)
    block = triton.next_power_of_2(size)
    _quantize[(num_tokens,)](
        x, values, scales, x.stride(0), size, BLOCK=block, num_warps=_num_warps(block)
    )
    return values, scales


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x, or of x + residual, [T, E], quantized; `x` becomes that sum."""
    num_tokens, size = x.shape
    values, scales = _empty_rows(num_tokens, size, x.device)
    block = triton.next_power_of_2(size)
    _norm_quantize[(num_tokens,)](
        x, x if residual is None else residual, weight, values, scales, eps, size,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return values, scales


def silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2 F], contiguous -> silu of the first half times the second, [T, F], quantized."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    values, scales = _empty_rows(num_tokens, size, gate_up.device)
    block = triton.next_power_of_2(size)
    _silu_mul_quantize[(num_tokens,)](
        gate_up, values, scales, size, BLOCK=block, num_warps=_num_warps(block)
    )
    return values, scales


def product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [T, I] in bf16, weight [O, I] in FP8 with a scale [O] an output -> [T, O] in bf16."""
    if len(x) <= FEW_TOKENS and takes(x, weight):
        return matvec(x, weight, bias=bias, scale=scale)
    return quantized_product(*quantize_rows(x), weight, scale, bias)


def quantized_product(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As `product`, of rows that are quantized already."""
    out = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scales,
        scale_b=scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    # Not by the product: cuBLASLt refuses some shapes with a bias (33 tokens, 14,336 features).
    return out if bias is None else out.add_(bias)


def _empty_rows(
    num_tokens: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(num_tokens, size, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(num_tokens, 1, dtype=torch.float32, device=device)


def _num_warps(block: int) -> int:
    return min(max(block // 512, 4), 16)
