"""A decoder's shape, read from a Hugging Face config.json of any age.

Both forms are read: the classic one (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of
transformers 5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.worker.engine.layers.fp8 import Fp8Scheme
from services.worker.engine.layers.rotary import RopeConfig, RopeScaling, yarn_magnitude
from services.worker.engine.models.quantization import parse_quantization

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that tells one decoder from another."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    # Of query, key and value projections; of attention's output; of the MLP's projections.
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    # RMS norm on each head of queries and keys.
    qk_norm: bool
    # Per layer; None attends to everything before.
    sliding_windows: tuple[int | None, ...]
    # The checkpoint's: "float32", "bfloat16" or "float16".
    dtype: str
    # Used unless the operator names another; the longest that the rotary embedding is made for.
    context_length: int
    max_context_length: int
    # How the checkpoint's linear layers are quantized; None where they are not.
    fp8: Fp8Scheme | None = None

    @property
    def pair_work(self) -> float:
        """Arithmetic of attention to one earlier token over that of one token's linear layers.

        Those of the decoder; the LM head runs for few tokens of a prompt.
        """
        heads = self.num_heads * self.head_dim
        key_values = 2 * self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * heads + key_values + 3 * self.intermediate_size)
        return 2 * heads / layer


def parse_decoder(
    raw: Json,
    architecture: str,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sliding_windows: tuple[int | None, ...] | None = None,
) -> ModelConfig:
    """What all families share; the arguments are where they differ. Raises ValueError."""
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; supported: 'silu'")
    num_heads = integer(raw, "num_attention_heads")
    hidden_size = integer(raw, "hidden_size")
    head_dim = integer(raw, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"config.json: heads of {head_dim} numbers cannot be rotated in pairs")
    num_layers = integer(raw, "num_hidden_layers")
    num_kv_heads = integer(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} attention heads do not divide by {num_kv_heads} kv heads")
    rope = _parse_rope(raw, head_dim)
    default_context, max_context = _context_lengths(raw, rope.scaling)
    return ModelConfig(
        architecture=architecture,
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_windows=sliding_windows or (None,) * num_layers,
        dtype=_parse_dtype(raw),
        context_length=default_context,
        max_context_length=max_context,
        fp8=parse_quantization(raw),
    )


def integer(raw: Json, name: str, default: int | None = None) -> int:
    """A positive integer of config.json, required where there is no default. Raises ValueError."""
    value = raw.get(name)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def section(raw: Json, *names: str) -> Json:
    """The first object of these names that config.json has; empty where it has none.

    Raises ValueError for what is no object.
    """
    for name in names:
        value = raw.get(name)
        if value and not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} must be an object, got {value!r}")
        if value:
            return value
    return {}


def _parse_dtype(raw: Json) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"config.json: dtype {name!r} is not supported")
    return name


def _parse_rope(raw: Json, head_dim: int) -> RopeConfig:
    settings = section(raw, "rope_parameters", "rope_scaling")
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise ValueError("config.json: rotary embeddings that differ by layer are not supported")
    partial = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported")
    theta = _number(settings, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    return RopeConfig(theta=theta, head_dim=head_dim, scaling=_parse_scaling(raw, settings))


def _parse_scaling(raw: Json, settings: Json) -> RopeScaling | None:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return None
    max_positions = integer(raw, "max_position_embeddings")
    original = (
        raw.get("original_max_position_embeddings")
        or settings.get("original_max_position_embeddings")
        or max_positions
    )
    factor = settings.get("factor")
    if factor is None and kind == "yarn":
        factor = max_positions / original
    factor = _number({"factor": factor}, "factor")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind=kind, factor=factor, original_context=max_positions)
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=factor,
            original_context=original,
            low_freq_factor=_number(settings, "low_freq_factor"),
            high_freq_factor=_number(settings, "high_freq_factor"),
        )
    if kind == "yarn":
        return RopeScaling(
            kind=kind,
            factor=factor,
            original_context=original,
            beta_fast=settings.get("beta_fast") or 32.0,
            beta_slow=settings.get("beta_slow") or 1.0,
            attention_factor=_yarn_attention_factor(settings, factor),
            truncate=settings.get("truncate", True),
        )
    raise ValueError(
        f"config.json: rope scaling {kind!r} is not supported; "
        "supported: default, linear, dynamic, llama3, yarn"
    )


def _number(settings: Json, name: str, default: float | None = None) -> float:
    value = settings.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float):
        raise ValueError(f"config.json: {name} must be a number, got {value!r}")
    return float(value)


def _yarn_attention_factor(settings: Json, factor: float) -> float | None:
    given = settings.get("attention_factor")
    if given is not None:
        return float(given)
    scale, scale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if scale and scale_all:
        return yarn_magnitude(factor, scale) / yarn_magnitude(factor, scale_all)
    return None


def _context_lengths(raw: Json, scaling: RopeScaling | None) -> tuple[int, int]:
    """Default and longest context.

    Checkpoints disagree on whether `max_position_embeddings` is stretched already; only YaRN's
    states the original beside it. So "linear" and "dynamic" stretch further on request only.
    """
    max_positions = integer(raw, "max_position_embeddings")
    if scaling is None or scaling.kind == "llama3":
        return max_positions, max_positions
    stretched = int(scaling.original_context * scaling.factor)
    if scaling.kind == "yarn":
        longest = max(max_positions, stretched)
        return longest, longest
    return max_positions, max(max_positions, stretched)
