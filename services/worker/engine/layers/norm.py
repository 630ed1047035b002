"""Root mean square layer norm (Zhang and Sennrich, arXiv 1910.07467), summed in float32.

Shapes: E features normalised over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.worker.engine.layers.fused import fused_kernels
from services.worker.engine.layers.parameters import Placement, StoredTensor


class RmsNorm:
    """Rounds to the input's type before the weight is applied, as Hugging Face's models do."""

    def __init__(self, name: str, size: int, eps: float, placement: Placement) -> None:
        self._name = name
        self._eps = eps
        self._shape = (size,)
        self.weight = placement.empty(size)
        self._fused = fused_kernels(placement.device, placement.dtype, placement.compiled)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self._name}.weight": self._shape}

    def load(self, name: str, tensor: StoredTensor) -> None:
        self.weight.copy_(tensor[...])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., E] -> [..., E]"""
        if self._fused is not None and x.ndim == 2:
            return self._fused.rms_norm(x, self.weight, self._eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self._shape, self.weight, self._eps)
        return F.rms_norm(x.float(), self._shape, None, self._eps).to(x.dtype) * self.weight

    def forward_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum; may overwrite `x`."""
        if self._fused is not None:
            return self._fused.add_rms_norm(x, residual, self.weight, self._eps), x
        total = x.add_(residual)
        return self.forward(total), total
