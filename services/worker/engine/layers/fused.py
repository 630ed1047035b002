"""Whether a layer has kernels that do in one launch what torch does in several."""

from __future__ import annotations

from typing import Protocol

import torch


class FusedKernels(Protocol):
    """What `services.worker.engine.kernels.fused` offers."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        locations: torch.Tensor,
        norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> torch.Tensor: ...


def fused_kernels(
    device: torch.device, dtype: torch.dtype, compiled: FusedKernels | None = None
) -> FusedKernels | None:
    """The kernels for 16-bit types on GPUs; elsewhere `compiled`, where the operator asked for it.

    Without either, torch computes: in float32 it is the reference.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return compiled
    # Imported where there is a GPU: other machines may lack Triton.
    from services.worker.engine.kernels import fused

    return fused


class Fp8Kernels(Protocol):
    """What `services.worker.engine.kernels.fp8` offers."""

    # Up to so many tokens are multiplied as they are.
    FEW_TOKENS: int

    def rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def silu_mul(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def quantized_product(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor: ...

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor: ...


def fp8_kernels(device: torch.device) -> Fp8Kernels | None:
    """The FP8 kernels of GPUs; elsewhere the layers compute the same in torch."""
    if device.type != "cuda":
        return None
    from services.worker.engine.kernels import fp8

    return fp8
