"""Trains the model: plain torch, AdamW, weights in fp32 and products in bf16 where it can."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from .batches import IGNORED, Batches
from .corpus import BOS, END, EOS
from .tokenizer import CONTEXT, token_id, write_json

LARGEST_FILE: Final = 12_000_000


@dataclass(frozen=True)
class Settings:
    """What a training run is made of."""

    steps: int = 8000
    tokens: int = 65_536
    rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.05
    minutes: float = 0.0
    workers: int = 0
    seed: int = 1


def model_config(tokenizer: Tokenizer, **changes: Any) -> LlamaConfig:
    """The model's shape: four layers, heads of 128, two KV heads for four query heads."""
    end, eos = token_id(tokenizer, END), token_id(tokenizer, EOS)
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": token_id(tokenizer, BOS),
        "eos_token_id": [end, eos],
        "pad_token_id": eos,
    }
    return LlamaConfig(**(shape | changes))


def _rate(settings: Settings, step: int, started: float) -> float:
    """The learning rate: a short rise, then half a cosine, by steps or by the clock."""
    done = step / settings.steps
    if settings.minutes:
        done = max(done, (time.monotonic() - started) / 60 / settings.minutes)
    rise = min(1.0, (step + 1) / settings.warmup)
    return settings.rate * rise * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _optimizer(model: torch.nn.Module, settings: Settings, device: str) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), eps=1e-9, fused=fused)


def _loss(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss over what the assistant says; other positions never reach the head."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    said = targets != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[said]).float(), targets[said])


def train(config: LlamaConfig, tokenizer: Tokenizer, settings: Settings, device: str) -> Any:
    """Train a fresh model and return it on the CPU."""
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    model: Any = LlamaForCausalLM(config)
    model.to(device).train()
    optimizer = _optimizer(model, settings, device)
    batches = DataLoader(
        Batches(tokenizer, settings.seed, settings.steps, settings.tokens),
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=8 if settings.workers else None,
        pin_memory=device.startswith("cuda"),
    )
    started, seen, recent = time.monotonic(), 0, torch.zeros((), device=device)
    for step, (ids, targets) in enumerate(batches):
        rate = _rate(settings, step, started)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = ids.to(device, non_blocking=True).long()
        targets = targets.to(device, non_blocking=True).long()
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
            loss = _loss(model, ids, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent, seen = recent + loss.detach(), seen + ids.numel()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            passed = time.monotonic() - started
            mean = float(recent) / (step % 100 + 1)
            print(
                f"step {step + 1} loss {mean:.5f} rate {rate:.2e} "
                f"{seen / passed / 1000:.0f}k tokens/s {passed:.0f} s",
                flush=True,
            )
            recent = torch.zeros((), device=device)
        if settings.minutes and time.monotonic() - started > settings.minutes * 60:
            break
    return model.cpu().eval()


def save(model: Any, folder: Path) -> int:
    """Write the weights in bf16 with their configuration; return the file's size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    config = model.config
    shown = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps "
        "tie_word_embeddings attention_bias mlp_bias bos_token_id eos_token_id pad_token_id"
    ).split()
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{name: getattr(config, name) for name in shown},
            "rope_theta": 10_000.0,
            "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "do_sample": False,
        },
    )
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path} has {size} bytes, more than {LARGEST_FILE}")
    return size
