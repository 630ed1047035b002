"""Tiny random checkpoints in Hugging Face's format, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 96

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Large, so that the most likely token is so by far.
    "initializer_range": 0.3,
}


def write_checkpoint(
    path: Path, family: str, *, max_shard_size: str = "1GB", **changes: Any
) -> transformers.PreTrainedModel:
    """Write a random `family` ("Llama", "Qwen3", ...) model to `path`; returns the original."""
    config_type = getattr(transformers, f"{family}Config")
    model_type = getattr(transformers, f"{family}ForCausalLM")
    config = config_type(**{**_SHAPE, "attn_implementation": "eager", **changes})
    torch.manual_seed(0)
    model = model_type(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones and zeros as initialised would hide a weight or bias that is not applied.
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def greedy_ids(model: transformers.PreTrainedModel, prompt: list[int], num: int) -> list[int]:
    """What transformers decodes greedily after `prompt`."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num,
            do_sample=False,
            eos_token_id=None,
        )
    return output[0, len(prompt) :].tolist()
