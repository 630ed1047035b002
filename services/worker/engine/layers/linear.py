"""Linear layers: packed column-parallel and row-parallel.

Shapes: T tokens, I input features, O output features of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.worker.engine.layers.fp8 import Rows
from services.worker.engine.layers.matrix import make_matrix
from services.worker.engine.layers.norm import RmsNorm
from services.worker.engine.layers.parameters import Placement, StoredTensor, shard_size
from services.worker.engine.layers.products import few_token_kernels


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint matrix inside a packed layer, for example `q_proj`.

    Its output features are `num_units` units (heads, or single features) of `unit_size`. Where
    there are fewer units than ranks, neighbouring ranks hold copies of one unit.
    """

    name: str
    num_units: int
    unit_size: int = 1


class ColumnParallelLinear:
    """Several matrices over the same input, stacked; each rank holds some outputs of each.

    Output order is the parts' order, so a caller splits the result by `sizes`.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        in_features: int,
        *,
        bias: bool,
        placement: Placement,
        prefix: str = "",
    ) -> None:
        self._in_features = in_features
        self._rows: dict[str, tuple[Part, slice, slice]] = {}
        offset = 0
        for part in parts:
            source = _unit_range(part, placement)
            size = source.stop - source.start
            self._rows[part.name] = (part, source, slice(offset, offset + size))
            offset += size
        self.sizes = tuple(source.stop - source.start for _, source, _ in self._rows.values())
        names = [prefix + part.name for part in parts]
        self.matrix = make_matrix(names, offset, in_features, placement)
        self.bias = placement.empty(offset) if bias else None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (part, _, _) in self._rows.items():
            out_features = part.num_units * part.unit_size
            for kind, shape in self.matrix.tensors(out_features, self._in_features).items():
                shapes[f"{name}.{kind}"] = shape
            if self.bias is not None:
                shapes[f"{name}.bias"] = (out_features,)
        return shapes

    def load(self, name: str, tensor: StoredTensor) -> None:
        part_name, kind = name.rsplit(".", 1)
        _, source, target = self._rows[part_name]
        if kind != "bias":
            self.matrix.load(kind, tensor, target=target, rows=source, columns=slice(None))
            return
        assert self.bias is not None, "tensors() names a bias only where there is one"
        self.bias[target].copy_(tensor[source])

    def forward(self, x: Rows) -> torch.Tensor:
        """[T, I] -> [T, O]"""
        return self.matrix.multiply(x, self.bias)

    def forward_normed(self, x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Of the norm of x, [T, I] -> [T, O]; one launch for one token."""
        weight, scale = self.matrix.weight, self.matrix.scale
        kernels = few_token_kernels(x, weight)
        if kernels is None or len(x) > 1:
            return self.forward(norm.forward_rows(x))
        return kernels.matvec(
            x, weight, bias=self.bias, scale=scale, norm_weight=norm.weight, eps=norm.eps
        )

    def forward_gated(self, x: Rows, norm: RmsNorm | None = None) -> torch.Tensor | None:
        """silu(first half of the outputs) * second half, [T, I] -> [T, O / 2], in one launch.

        Of the norm of x where one is given. None where there is no such kernel.
        """
        weight, scale = self.matrix.weight, self.matrix.scale
        if not isinstance(x, torch.Tensor) or (norm is not None and len(x) > 1):
            return None
        kernels = few_token_kernels(x, weight, gated=True)
        if kernels is None:
            return None
        if norm is None:
            return kernels.gated_matvec(x, weight, bias=self.bias, scale=scale)
        return kernels.gated_matvec(
            x, weight, bias=self.bias, scale=scale, norm_weight=norm.weight, eps=norm.eps
        )


class RowParallelLinear:
    """One matrix whose inputs are divided among the ranks; outputs are summed over them."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        placement: Placement,
        prefix: str = "",
    ) -> None:
        self._name = name
        self._shape = (out_features, in_features)
        self._group = placement.group
        size = shard_size(in_features, placement.group, f"input features of {name}")
        self._source = slice(placement.group.rank * size, (placement.group.rank + 1) * size)
        self.matrix = make_matrix([prefix + name], out_features, size, placement)
        self.bias = placement.empty(out_features) if bias else None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        kinds = self.matrix.tensors(*self._shape)
        shapes = {f"{self._name}.{kind}": shape for kind, shape in kinds.items()}
        if self.bias is not None:
            shapes[f"{self._name}.bias"] = self._shape[:1]
        return shapes

    def load(self, name: str, tensor: StoredTensor) -> None:
        kind = name.rsplit(".", 1)[1]
        if kind != "bias":
            whole = slice(0, self._shape[0])
            self.matrix.load(kind, tensor, target=whole, rows=whole, columns=self._source)
            return
        assert self.bias is not None, "tensors() names a bias only where there is one"
        self.bias.copy_(tensor[...])

    def forward(self, x: Rows) -> torch.Tensor:
        """[T, I] -> [T, O]"""
        if self._group.size == 1:
            return self.matrix.multiply(x, self.bias)
        out = self._group.all_reduce(self.matrix.multiply(x))
        return out if self.bias is None else out.add_(self.bias)

    def forward_add(self, x: Rows, residual: torch.Tensor) -> torch.Tensor:
        """The outputs plus the residual [T, O], in one launch for few tokens on one rank."""
        weight, scale = self.matrix.weight, self.matrix.scale
        if self._group.size > 1 or not isinstance(x, torch.Tensor):
            return self.forward(x).add_(residual)
        kernels = few_token_kernels(x, weight)
        if kernels is None:
            return self.forward(x).add_(residual)
        return kernels.matvec(x, weight, bias=self.bias, scale=scale, residual=residual)


def _unit_range(part: Part, placement: Placement) -> slice:
    """The rows of a part's full matrix that this rank holds."""
    rank, size = placement.group.rank, placement.group.size
    if part.num_units >= size:
        units = shard_size(part.num_units, placement.group, f"outputs of {part.name}")
        first = rank * units
    elif size % part.num_units == 0:
        units = 1
        first = rank * part.num_units // size
    else:
        raise ValueError(
            f"tp_size {size} is no multiple of the {part.num_units} heads of {part.name}"
        )
    return slice(first * part.unit_size, (first + units) * part.unit_size)
