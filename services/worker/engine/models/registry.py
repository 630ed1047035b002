"""Which architectures are served, and how each one's config.json becomes a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from services.common.model_files import read_json
from services.worker.engine.models.config import Json, ModelConfig, integer, parse_decoder


def _llama(raw: Json, architecture: str) -> ModelConfig:
    attention_bias = bool(raw.get("attention_bias", False))
    return parse_decoder(
        raw,
        architecture,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _mistral(raw: Json, architecture: str) -> ModelConfig:
    window = raw.get("sliding_window")
    windows = (window,) * integer(raw, "num_hidden_layers")
    return parse_decoder(raw, architecture, sliding_windows=windows)


def _qwen2(raw: Json, architecture: str) -> ModelConfig:
    return parse_decoder(raw, architecture, qkv_bias=True, sliding_windows=_qwen_windows(raw))


def _qwen3(raw: Json, architecture: str) -> ModelConfig:
    attention_bias = bool(raw.get("attention_bias", False))
    return parse_decoder(
        raw,
        architecture,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        sliding_windows=_qwen_windows(raw),
    )


def _seed_oss(raw: Json, architecture: str) -> ModelConfig:
    return parse_decoder(
        raw,
        architecture,
        qkv_bias=bool(raw.get("attention_bias", True)),
        output_bias=bool(raw.get("attention_out_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _qwen_windows(raw: Json) -> tuple[int | None, ...]:
    """`layer_types` where given, else: layers from `max_window_layers` on use the window."""
    num_layers = integer(raw, "num_hidden_layers")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", num_layers)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise ValueError(f"config.json: {len(kinds)} layer_types for {num_layers} layers")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"config.json: layer_types {sorted(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# Architecture name of config.json -> its adapter. A new family of decoders is a line here.
ARCHITECTURES: dict[str, Callable[[Json, str], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "SeedOssForCausalLM": _seed_oss,
}


def load_model_config(model_path: Path) -> ModelConfig:
    """Read `model_path`/config.json. Raises ValueError naming what is not supported."""
    raw = read_json(model_path / "config.json")
    if not raw:
        raise ValueError(f"no config.json in {model_path}")
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json: architectures must be a list of names, got {names!r}")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name](raw, name)
    raise ValueError(
        f"architecture {', '.join(names) or '(none named)'} is not supported; "
        f"supported: {', '.join(sorted(ARCHITECTURES))}"
    )
