"""The decoder that Llama, Mistral and Qwen share: their differences are ModelConfig's fields.

Shapes: T tokens of the step, R rows, E hidden size, V vocabulary, H query heads and K key/value
heads of this rank, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from services.worker.engine.attention.backend import AttentionBackend, AttentionLayer
from services.worker.engine.kv.pool import StepPlaces, write_tokens
from services.worker.engine.layers.embedding import (
    VocabularyShard,
    compute_largest,
    compute_logits,
    embed,
    logits_dtypes,
)
from services.worker.engine.layers.fp8 import Fp8Rows, Rows
from services.worker.engine.layers.fused import fused_kernels
from services.worker.engine.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from services.worker.engine.layers.norm import RmsNorm
from services.worker.engine.layers.parameters import Layer, Placement
from services.worker.engine.layers.products import has_few_token_kernels
from services.worker.engine.layers.rotary import RotaryTable, rotate
from services.worker.engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class _Step:
    """What the layers of one forward pass share."""

    # [T, 1, D / 2]
    cos: torch.Tensor
    sin: torch.Tensor
    places: StepPlaces
    backend: AttentionBackend


class Attention:
    """Projections, optional norms of heads, rotation, the write of keys and values.

    The attention itself is the backend's.
    """

    def __init__(self, config: ModelConfig, index: int, placement: Placement) -> None:
        head_dim = config.head_dim
        self.qkv = ColumnParallelLinear(
            (
                Part("q_proj", config.num_heads, head_dim),
                Part("k_proj", config.num_kv_heads, head_dim),
                Part("v_proj", config.num_kv_heads, head_dim),
            ),
            config.hidden_size,
            bias=config.qkv_bias,
            placement=placement,
            prefix=f"model.layers.{index}.self_attn.",
        )
        self.output = RowParallelLinear(
            "o_proj",
            config.num_heads * head_dim,
            config.hidden_size,
            bias=config.output_bias,
            placement=placement,
            prefix=f"model.layers.{index}.self_attn.",
        )
        self.norms: tuple[RmsNorm, RmsNorm] | None = None
        if config.qk_norm:
            self.norms = (
                RmsNorm("q_norm", head_dim, config.norm_eps, placement),
                RmsNorm("k_norm", head_dim, config.norm_eps, placement),
            )
        self.spec = AttentionLayer(
            index=index, scale=head_dim**-0.5, sliding_window=config.sliding_windows[index]
        )
        self._fused = fused_kernels(placement.device, placement.dtype, placement.compiled)
        self._head_dim = head_dim
        self._num_heads, self._num_kv_heads, _ = (size // head_dim for size in self.qkv.sizes)

    def forward(self, x: Rows, step: _Step) -> torch.Tensor:
        """[T, E] -> [T, E]"""
        return self.output.forward(self.attend(self.qkv.forward(x), step))

    def attend(self, qkv: torch.Tensor, step: _Step) -> torch.Tensor:
        """[T, (H + 2 K) D] -> [T, H D]"""
        queries = self._rotate_and_write(qkv, step)
        return step.backend.run(queries, self.spec).flatten(1)

    def _rotate_and_write(self, qkv: torch.Tensor, step: _Step) -> torch.Tensor:
        """Queries [T, H, D], rotated; keys and values go to the pool.

        Heads of queries and keys are normed first if there are norms.
        """
        pool, locations = step.places.pool, step.places.locations
        keys, values = pool.keys(self.spec.index), pool.values(self.spec.index)
        if self._fused is not None:
            weights, eps = None, 0.0
            if self.norms is not None:
                q_norm, k_norm = self.norms
                weights, eps = (q_norm.weight, k_norm.weight), q_norm.eps
            return self._fused.rotate_and_write(
                qkv, step.cos, step.sin, keys, values, locations, weights, eps
            )
        heads = qkv.view(len(qkv), -1, self._head_dim)
        rotated_heads = self._num_heads + self._num_kv_heads
        # Queries and keys lie side by side, so one rotation serves both.
        qk = heads[:, :rotated_heads]
        if self.norms is not None:
            q_norm, k_norm = self.norms
            q, k = qk[:, : self._num_heads], qk[:, self._num_heads :]
            qk = torch.cat((q_norm.forward(q), k_norm.forward(k)), dim=1)
        qk = rotate(qk, step.cos, step.sin)
        write_tokens(keys, locations, qk[:, self._num_heads :])
        write_tokens(values, locations, heads[:, rotated_heads:])
        return qk[:, : self._num_heads]


class Mlp:
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, index: int, placement: Placement) -> None:
        self.gate_up = ColumnParallelLinear(
            (
                Part("gate_proj", config.intermediate_size),
                Part("up_proj", config.intermediate_size),
            ),
            config.hidden_size,
            bias=config.mlp_bias,
            placement=placement,
            prefix=f"model.layers.{index}.mlp.",
        )
        self.down = RowParallelLinear(
            "down_proj",
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            placement=placement,
            prefix=f"model.layers.{index}.mlp.",
        )
        self._fused = fused_kernels(placement.device, placement.dtype, placement.compiled)

    def forward(self, x: Rows) -> torch.Tensor:
        """[T, E] -> [T, E]"""
        return self.down.forward(self._gated(x))

    def forward_add(self, residual: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Of the norm of the residual, plus the residual, [T, E] -> [T, E]."""
        return self.down.forward_add(self._gated(residual, norm), residual)

    def _gated(self, x: Rows, norm: RmsNorm | None = None) -> Rows:
        gated = self.gate_up.forward_gated(x, norm)
        if gated is not None:
            return gated
        if norm is not None and isinstance(x, torch.Tensor):
            x = norm.forward_rows(x)
        both = self.gate_up.forward(x)
        fp8 = self.down.matrix.kernels
        if fp8 is not None and len(both) > fp8.FEW_TOKENS:
            return Fp8Rows(*fp8.silu_mul(both))
        if self._fused is not None:
            return self._fused.silu_mul(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class DecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(self, config: ModelConfig, index: int, placement: Placement) -> None:
        self.attention = Attention(config, index, placement)
        self.mlp = Mlp(config, index, placement)
        size, eps = config.hidden_size, config.norm_eps
        self.input_norm = RmsNorm(
            "input_layernorm", size, eps, placement, self.attention.qkv.matrix.kernels
        )
        self.mlp_norm = RmsNorm(
            "post_attention_layernorm", size, eps, placement, self.mlp.gate_up.matrix.kernels
        )

    def forward(self, residual: torch.Tensor, step: _Step) -> torch.Tensor:
        """[T, E] -> [T, E], norms and additions being part of the products where they can be."""
        attention = self.attention
        qkv = attention.qkv.forward_normed(residual, self.input_norm)
        attended = attention.attend(qkv, step)
        residual = attention.output.forward_add(attended, residual)
        return self.mlp.forward_add(residual, self.mlp_norm)

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """Every layer with parameters and its checkpoint prefix."""
        yield "", self.input_norm
        yield "", self.mlp_norm
        yield "self_attn.", self.attention.qkv
        yield "self_attn.", self.attention.output
        for norm in self.attention.norms or ():
            yield "self_attn.", norm
        yield "mlp.", self.mlp.gate_up
        yield "mlp.", self.mlp.down


class Decoder:
    """One rank's shard of the model; parameters are uninitialised until loaded."""

    def __init__(self, config: ModelConfig, context_length: int, placement: Placement) -> None:
        self.config = config
        vocab_size, hidden_size = config.vocab_size, config.hidden_size
        embedding_name = "model.embed_tokens.weight"
        self._embedding = VocabularyShard(embedding_name, vocab_size, hidden_size, placement)
        self._head = self._embedding
        # A tied head has a copy of its own where products want another layout than lookups.
        if not config.tied_embeddings or placement.stores_columns(hidden_size):
            name = embedding_name if config.tied_embeddings else "lm_head.weight"
            self._head = VocabularyShard(name, vocab_size, hidden_size, placement, is_head=True)
        self._layers = [
            DecoderLayer(config, index, placement) for index in range(config.num_layers)
        ]
        self._norm = RmsNorm("model.norm", config.hidden_size, config.norm_eps, placement)
        self._rotary = RotaryTable(config.rope, context_length, placement.device, placement.dtype)
        self._fuses_products = has_few_token_kernels(placement.device, placement.dtype)

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """Every layer with parameters and its checkpoint prefix."""
        yield "", self._embedding
        for index, layer in enumerate(self._layers):
            for prefix, part in layer.layers():
                yield f"model.layers.{index}.{prefix}", part
        yield "", self._norm
        if self._head is not self._embedding:
            yield "", self._head

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        places: StepPlaces,
        backend: AttentionBackend,
    ) -> torch.Tensor:
        """[T] ids and positions -> [T, E] after the last norm; keys and values go to `places`."""
        step = _Step(*self._rotary.at(positions), places, backend)
        residual = embed(self._embedding, token_ids)
        if self._fuses_products and len(token_ids) == 1:
            for layer in self._layers:
                residual = layer.forward(residual, step)
            return self._norm.forward(residual)
        x = self._layers[0].input_norm.forward_rows(residual)
        for index, layer in enumerate(self._layers):
            x = layer.attention.forward(x, step)
            x, residual = layer.mlp_norm.forward_add(x, residual)
            x = layer.mlp.forward(x)
            following = (
                self._layers[index + 1].input_norm if index + 1 < len(self._layers) else self._norm
            )
            x, residual = following.forward_add(x, residual)
        assert isinstance(x, torch.Tensor), "the output head is not in FP8"
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R, V], in one of `logits_dtypes`."""
        return compute_logits(self._head, hidden)

    @property
    def logits_dtypes(self) -> tuple[torch.dtype, ...]:
        """The types that `logits` may give, by the number of rows."""
        return logits_dtypes(self._head)

    def largest(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R] ids of the largest logits, without bringing all logits to every rank."""
        return compute_largest(self._head, hidden)
