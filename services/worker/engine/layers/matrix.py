"""The weights of a linear layer, in the form in which they are multiplied.

Shapes: T tokens, I input features, O output features of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from services.worker.engine.layers.fp8 import FEATURE_MULTIPLE, Fp8Matrix, Rows
from services.worker.engine.layers.fused import Fp8Kernels
from services.worker.engine.layers.parameters import Placement, StoredTensor
from services.worker.engine.layers.products import multiply


class Matrix(Protocol):
    """One rank's [O, I] weights, of one or several checkpoint matrices over the same input."""

    weight: torch.Tensor

    @property
    def scale(self) -> torch.Tensor | None:
        """[O] in float32, of FP8 weights: what sums are multiplied by; else None."""

    @property
    def kernels(self) -> Fp8Kernels | None:
        """What may round activations to FP8 for `multiply`; None where it takes them as made."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Full shape of what a checkpoint states for one matrix of this size, by kind."""

    def load(
        self, kind: str, tensor: StoredTensor, *, target: slice, rows: slice, columns: slice
    ) -> None:
        """Take `rows` and `columns` of a full tensor as this rank's rows `target`."""

    def multiply(self, x: Rows, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, I] -> [T, O]"""


class DenseMatrix:
    """Owns `weight` [O, I] in the model's type."""

    scale = None
    kernels = None

    def __init__(self, out_features: int, in_features: int, placement: Placement) -> None:
        self.weight = placement.empty_matrix(out_features, in_features)

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (out_features, in_features)}

    def load(
        self, kind: str, tensor: StoredTensor, *, target: slice, rows: slice, columns: slice
    ) -> None:
        self.weight[target].copy_(tensor[rows, columns])

    def multiply(self, x: Rows, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(x, torch.Tensor), "only FP8 weights are multiplied with FP8 rows"
        return multiply(x, self.weight, bias)


def make_matrix(
    names: Sequence[str], out_features: int, in_features: int, placement: Placement
) -> Matrix:
    """In FP8 where the placement's scheme covers the layers of these full module names.

    Raises ValueError when it covers some of them only, or their features are too odd for the GPU.
    """
    scheme = placement.fp8
    covered = [scheme is not None and scheme.covers(name) for name in names]
    if scheme is None or not any(covered):
        return DenseMatrix(out_features, in_features, placement)
    if not all(covered):
        raise ValueError(
            f"{', '.join(names)} are multiplied as one, but not all of them are in FP8"
        )
    if placement.device.type == "cuda":
        check_features(names, out_features, in_features)
    return Fp8Matrix(out_features, in_features, scheme, placement)


def check_features(names: Sequence[str], out_features: int, in_features: int) -> None:
    """Raises ValueError for sizes that the FP8 tensor cores' loads cannot be aligned to."""
    if out_features % FEATURE_MULTIPLE or in_features % FEATURE_MULTIPLE:
        raise ValueError(
            f"{', '.join(names)}: FP8 needs features in multiples of {FEATURE_MULTIPLE} on each "
            f"rank, got {in_features} in and {out_features} out"
        )
