"""Random products with few tokens, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """One product and what is done in its launch."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    norm_weight: torch.Tensor | None
    residual: torch.Tensor | None
    gated: bool

    def __repr__(self) -> str:
        names = ("bias", "scale", "norm_weight", "residual")
        done = [name for name in names if getattr(self, name) is not None]
        return f"x {[*self.x.shape]}, weight {[*self.weight.shape]}, gated {self.gated}, {done}"

    @classmethod
    def random(
        cls,
        generator: torch.Generator,
        *,
        num_tokens: int,
        dtype: torch.dtype,
        device: str,
        max_rows: int = 6000,
        max_size: int = 5000,
    ) -> Case:
        """Of any even number of outputs and any multiple of 16 features."""

        values = torch.Generator(device).manual_seed(int(generator.initial_seed()))

        def flip() -> bool:
            return bool(torch.randint(0, 2, (1,), generator=generator))

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=values, device=device).to(dtype)

        num_rows = 2 * int(torch.randint(1, max_rows // 2, (1,), generator=generator))
        size = 16 * int(torch.randint(1, max_size // 16, (1,), generator=generator))
        gated, weight = flip(), randn(num_rows, size)
        has_scale, has_norm = num_tokens == 1 and flip(), num_tokens == 1 and flip()
        return cls(
            x=randn(num_tokens, size + 16)[:, :size],
            weight=weight.to(torch.float8_e4m3fn) if has_scale else weight,
            bias=randn(num_rows) if flip() else None,
            scale=randn(num_rows).float() if has_scale else None,
            norm_weight=randn(size) if has_norm else None,
            residual=None if gated or flip() else randn(num_tokens, num_rows),
            gated=gated,
        )


def run(case: Case) -> torch.Tensor:
    """By the kernels."""
    from services.worker.engine.kernels import matvec

    if case.gated:
        return matvec.gated_matvec(
            case.x, case.weight, bias=case.bias, scale=case.scale,
            norm_weight=case.norm_weight, eps=EPS,
        )  # fmt: skip
    return matvec.matvec(
        case.x, case.weight, bias=case.bias, scale=case.scale, norm_weight=case.norm_weight,
        eps=EPS, residual=case.residual,
    )  # fmt: skip


def relative_error(case: Case, out: torch.Tensor) -> float:
    """Of the whole result against float64."""
    x = case.x.double()
    if case.norm_weight is not None:
        x = F.rms_norm(x, x.shape[1:], case.norm_weight.double(), EPS)
    expected = F.linear(x, case.weight.double())
    if case.scale is not None:
        expected *= case.scale.double()
    if case.bias is not None:
        expected += case.bias.double()
    if case.gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = F.silu(gate) * up
    if case.residual is not None:
        expected += case.residual.double()
    return float((out.double() - expected).norm() / expected.norm())
