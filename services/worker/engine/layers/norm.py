"""Root mean square layer norm (Zhang and Sennrich, arXiv 1910.07467), summed in float32.

Shapes: E features normalised over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.worker.engine.layers.fp8 import Fp8Rows, Rows
from services.worker.engine.layers.fused import Fp8Kernels, fused_kernels
from services.worker.engine.layers.parameters import Placement, StoredTensor


class RmsNorm:
    """Rounds to the input's type before the weight is applied, as Hugging Face's models do.

    With `fp8`, what multiplies the result takes many rows in FP8: they are made so.
    """

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        placement: Placement,
        fp8: Fp8Kernels | None = None,
    ) -> None:
        self._name = name
        self.eps = eps
        self._shape = (size,)
        self.weight = placement.empty(size)
        self._fused = fused_kernels(placement.device, placement.dtype, placement.compiled)
        self._fp8 = fp8

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self._name}.weight": self._shape}

    def load(self, name: str, tensor: StoredTensor) -> None:
        self.weight.copy_(tensor[...])

    def forward_rows(self, x: torch.Tensor) -> Rows:
        """[T, E] -> [T, E]"""
        if self._fp8 is not None and len(x) > self._fp8.FEW_TOKENS:
            return Fp8Rows(*self._fp8.rms_norm(x, None, self.weight, self.eps))
        return self.forward(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., E] -> [..., E]"""
        if self._fused is not None and x.ndim == 2:
            return self._fused.rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self._shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self._shape, None, self.eps).to(x.dtype) * self.weight

    def forward_add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[Rows, torch.Tensor]:
        """The norm of x + residual, and that sum; may overwrite `x`."""
        if self._fp8 is not None and len(x) > self._fp8.FEW_TOKENS:
            return Fp8Rows(*self._fp8.rms_norm(x, residual, self.weight, self.eps)), x
        if self._fused is not None:
            return self._fused.add_rms_norm(x, residual, self.weight, self.eps), x
        total = x.add_(residual)
        return self.forward(total), total
