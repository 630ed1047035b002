"""Products of 16-bit activations with FP8 weights, and the quantization that they need, in Triton.

Many tokens are multiplied on the FP8 tensor cores, by activations that are rounded to FP8 with one
scale a token. Few tokens are bound by reading the weights, so those are widened in registers and
the activations stay as they are.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.worker.engine.kernels.matvec import matvec, takes

# Up to so many tokens, widening the weights beats rounding the activations (on an H100).
_FEW_TOKENS = 1
_FP8_MAX = tl.constexpr(448.0)
_MIN_AMAX = tl.constexpr(1e-12)


@triton.jit
def _quantize(x, values, scales, x_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(wide), 0), _MIN_AMAX)
    # As the reference does it, so that the bits are the same.
    scaled = wide * tl.div_rn(_FP8_MAX, amax)
    scaled = tl.minimum(tl.maximum(scaled, -_FP8_MAX), _FP8_MAX)
    tl.store(values + row * size + columns, scaled.to(values.dtype.element_ty), inside)
    tl.store(scales + row, amax * (1 / _FP8_MAX))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, I] -> values [T, I] in float8_e4m3fn and scales [T, 1] in float32."""
    num_tokens, size = x.shape
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _quantize[(num_tokens,)](
        x, values, scales, x.stride(0), size, BLOCK=block, num_warps=_num_warps(block)
    )
    return values, scales


def product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [T, I] in bf16, weight [O, I] in FP8 with a scale [O] an output -> [T, O] in bf16."""
    if len(x) <= _FEW_TOKENS and takes(x, weight):
        return matvec(x, weight, bias=bias, scale=scale)
    values, scales = quantize_rows(x)
    return torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scales,
        scale_b=scale[None],
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


def _num_warps(block: int) -> int:
    return min(max(block // 512, 4), 16)
