"""Linear layers' weights in FP8: float8_e4m3fn values with one float32 scale an output feature.

Activations get one scale a token at run time, so a product is exact up to its rounded inputs:
y[t, o] = (sum over i of xq[t, i] * wq[o, i]) * x_scale[t] * w_scale[o]. The format is that of
Micikevicius et al., arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, largest value 448.

Shapes: T tokens, I input features, O output features of this rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from services.worker.engine.layers.fused import Fp8Kernels, fp8_kernels
from services.worker.engine.layers.parameters import Placement, StoredTensor

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
# Keeps the scale of a row of zeros, and its inverse, finite.
MIN_AMAX = 1e-12
# What the tensor cores' loads are aligned to.
FEATURE_MULTIPLE = 16
# Rows of a 16-bit weight that are quantized at one time: bounds the float32 copies.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Scheme:
    """Which linear layers are in FP8, and how the checkpoint states their weights."""

    # Scales of the checkpoint's FP8 weights: one a matrix or one an output feature; None: its
    # weights are of 16 or 32 bits and are quantized while they are loaded.
    checkpoint_scales: Literal["tensor", "channel"] | None = None
    # Module names, or "re:" and a pattern, of layers that stay as they are.
    ignored: tuple[str, ...] = ()

    def covers(self, name: str) -> bool:
        """Whether the linear layer of this full module name is in FP8."""
        return not any(_matches(pattern, name) for pattern in self.ignored)


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Activations that were rounded where they were made: values [T, I], scales [T, 1]."""

    values: torch.Tensor
    scales: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)


# What a linear layer multiplies.
Rows = torch.Tensor | Fp8Rows


class Fp8Matrix:
    """Owns `weight` [O, I] and `scale` [O]; the reference's arithmetic off the GPU.

    There the values stand in the model's type, which holds them exactly, and a product is the
    same sum of the same rounded numbers. It serves accuracy runs and tests, and saves no memory.
    """

    def __init__(
        self, out_features: int, in_features: int, scheme: Fp8Scheme, placement: Placement
    ) -> None:
        self._scheme = scheme
        self._kernels = fp8_kernels(placement.device)
        if placement.device.type == "cpu":
            self.weight = placement.empty_matrix(out_features, in_features)
        else:
            self.weight = placement.empty(out_features, in_features, dtype=FP8_DTYPE)
        self.scale = placement.empty(out_features, dtype=torch.float32)

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        if self._scheme.checkpoint_scales is not None:
            per_channel = self._scheme.checkpoint_scales == "channel"
            shapes["weight_scale"] = (out_features,) if per_channel else ()
        return shapes

    def load(
        self, kind: str, tensor: StoredTensor, *, target: slice, rows: slice, columns: slice
    ) -> None:
        if kind == "weight_scale":
            # [O, 1] or [O]; [1] or [].
            scales = tensor[...].reshape(-1)
            per_channel = self._scheme.checkpoint_scales == "channel"
            self.scale[target].copy_(scales[rows] if per_channel else scales)
        elif self._scheme.checkpoint_scales is not None:
            if tensor.dtype != FP8_DTYPE:
                raise ValueError(
                    f"the checkpoint's configuration says float8_e4m3fn, a weight is {tensor.dtype}"
                )
            part = tensor[rows, columns].to(self.weight.device)
            self.weight[target].copy_(part.to(self.weight.dtype))
        else:
            self._quantize(tensor, target, rows, columns)

    @property
    def kernels(self) -> Fp8Kernels | None:
        """What rounds activations in the launch that makes them; None: they come as they are."""
        return self._kernels

    def multiply(self, x: Rows, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, I] -> [T, O]"""
        if isinstance(x, Fp8Rows):
            assert self._kernels is not None, "rows are rounded by the matrix's own kernels"
            return self._kernels.quantized_product(
                x.values, x.scales, self.weight, self.scale, bias
            )
        if self._kernels is not None:
            return self._kernels.product(x, self.weight, self.scale, bias)
        values, scales = quantize_rows(x)
        product = F.linear(values.to(x.dtype), self.weight).float()
        product *= scales
        product *= self.scale
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def _quantize(self, tensor: StoredTensor, target: slice, rows: slice, columns: slice) -> None:
        """From 16 or 32 bits; scales are of whole rows, so ranks that share a row agree on it."""
        weight, scale = self.weight[target], self.scale[target]
        for start in range(rows.start, rows.stop, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, rows.stop)
            values, scales = quantize_rows(tensor[start:stop].to(weight.device))
            taken = slice(start - rows.start, stop - rows.start)
            weight[taken].copy_(values[:, columns].to(weight.dtype))
            scale[taken] = scales[:, 0]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, I] -> values [T, I] in FP8 and scales [T, 1] in float32 with x = values * scales.

    A row's largest magnitude becomes the format's largest.
    """
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True).clamp_min_(MIN_AMAX)
    # Operations whose bits are the same everywhere: where torch divides by a number or a number
    # by a tensor, it multiplies by a reciprocal on some devices.
    inverse = torch.full_like(amax, FP8_MAX).div_(amax)
    values = (wide * inverse).clamp_(-FP8_MAX, FP8_MAX)
    return values.to(FP8_DTYPE), amax * (1 / FP8_MAX)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".")
