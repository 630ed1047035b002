"""Products with weights: by our own kernels where few tokens make reading the weights all the work.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class FewTokenKernels(Protocol):
    """What `services.worker.engine.kernels.matvec` offers."""

    def takes(self, x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False) -> bool: ...

    def matvec(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
        residual: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor: ...

    def gated_matvec(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor: ...


def has_few_token_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels at all. Float32 stays with torch: it is the reference."""
    return device.type == "cuda" and dtype != torch.float32


def few_token_kernels(
    x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False
) -> FewTokenKernels | None:
    """The kernels, if this product is for them."""
    if not has_few_token_kernels(x.device, x.dtype):
        return None
    # Imported where there is a GPU: other machines may lack Triton.
    from services.worker.engine.kernels import matvec

    return matvec if matvec.takes(x, weight, gated=gated) else None


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, I] and [O, I] of one type -> [T, O]"""
    kernels = few_token_kernels(x, weight)
    if kernels is not None:
        return kernels.matvec(x, weight, bias=bias)
    return F.linear(x, weight, bias)


def multiply_unrounded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same; our own kernels' sums stay in float32, and cuBLAS's come as it rounds them."""
    kernels = few_token_kernels(x, weight)
    if kernels is not None:
        return kernels.matvec(x, weight, out_dtype=torch.float32)
    return F.linear(x, weight)
