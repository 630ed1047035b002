"""Linear layers: packed column-parallel and row-parallel.

Shapes: T tokens, I input features, O output features of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from services.worker.engine.layers.parameters import Placement, StoredTensor, shard_size


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
        self, parts: tuple[Part, ...], in_features: int, *, bias: bool, placement: Placement
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
        self.weight = placement.empty_matrix(offset, in_features)
        self.bias = placement.empty(offset) if bias else None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (part, _, _) in self._rows.items():
            out_features = part.num_units * part.unit_size
            shapes[f"{name}.weight"] = (out_features, self._in_features)
            if self.bias is not None:
                shapes[f"{name}.bias"] = (out_features,)
        return shapes

    def load(self, name: str, tensor: StoredTensor) -> None:
        part_name, kind = name.rsplit(".", 1)
        _, source, target = self._rows[part_name]
        parameter = self.weight if kind == "weight" else self.bias
        assert parameter is not None, "tensors() names a bias only where there is one"
        parameter[target].copy_(tensor[source])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]"""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear:
    """One matrix whose inputs are divided among the ranks; outputs are summed over them."""

    def __init__(
        self, name: str, in_features: int, out_features: int, *, bias: bool, placement: Placement
    ) -> None:
        self._name = name
        self._shape = (out_features, in_features)
        self._group = placement.group
        size = shard_size(in_features, placement.group, f"input features of {name}")
        self._source = slice(placement.group.rank * size, (placement.group.rank + 1) * size)
        self.weight = placement.empty_matrix(out_features, size)
        self.bias = placement.empty(out_features) if bias else None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{self._name}.weight": self._shape}
        if self.bias is not None:
            shapes[f"{self._name}.bias"] = self._shape[:1]
        return shapes

    def load(self, name: str, tensor: StoredTensor) -> None:
        if name.endswith(".weight"):
            self.weight.copy_(tensor[:, self._source])
        else:
            assert self.bias is not None, "tensors() names a bias only where there is one"
            self.bias.copy_(tensor[...])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]"""
        if self._group.size == 1:
            return F.linear(x, self.weight, self.bias)
        out = self._group.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out.add_(self.bias)


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
