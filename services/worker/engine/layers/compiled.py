"""The elementwise work of a decoder layer as torch's compiler makes it: `--enable-torch-compile`.

For types and devices that have no kernels of our own. The arithmetic is the torch path's, fused;
sums may differ from it in the last bits. Compiled at first use for any number of tokens.

Shapes: T tokens, E hidden size, F intermediate size, H query heads, K key/value heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from services.worker.engine.kv.pool import write_tokens
from services.worker.engine.layers.rotary import rotate as plain_rotate


class CompiledKernels:
    """Owns the compiled functions; all layers share them."""

    def __init__(self) -> None:
        self._rms_norm = _compiled(_rms_norm)
        self._add_rms_norm = _compiled(_add_rms_norm)
        self._silu_mul = _compiled(_silu_mul)
        self._rotate = _compiled(plain_rotate)
        self._norm_rotate = _compiled(_norm_rotate)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[T, E] -> its norm."""
        normed: torch.Tensor = self._rms_norm(x, weight, eps)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """[T, E] -> the norm of x + residual; `x` becomes that sum."""
        normed: torch.Tensor = self._add_rms_norm(x, residual, weight, eps)
        return normed

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 F] -> silu of the first half times the second, [T, F]."""
        product: torch.Tensor = self._silu_mul(gate_up)
        return product

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
    ) -> torch.Tensor:
        """[T, (H + 2 K) D] -> rotated queries [T, H, D]; keys and values go to the pool's layer.

        With `norm_weights`, those of queries and of keys, heads are normed before they are rotated.
        """
        num_keys, head_dim = keys.shape[2:]
        heads = qkv.view(len(qkv), -1, head_dim)
        num_queries = heads.shape[1] - 2 * num_keys
        qk: torch.Tensor
        if norm_weights is None:
            qk = self._rotate(heads[:, :-num_keys], cos, sin)
        else:
            qk = self._norm_rotate(heads[:, :-num_keys], cos, sin, *norm_weights, num_queries, eps)
        write_tokens(keys, locations, qk[:, num_queries:])
        write_tokens(values, locations, heads[:, -num_keys:])
        return qk[:, :num_queries]


def _compiled(function: Callable[..., torch.Tensor]) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=True)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def _norm_rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    num_queries: int,
    eps: float,
) -> torch.Tensor:
    queries = _rms_norm(x[:, :num_queries], query_weight, eps)
    keys = _rms_norm(x[:, num_queries:], key_weight, eps)
    return plain_rotate(torch.cat((queries, keys), dim=1), cos, sin)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return _rms_norm(x.add_(residual), weight, eps)


def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
