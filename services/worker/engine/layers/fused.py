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

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor: ...


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
