"""Rotary frequencies against transformers, over settings that checkpoints use."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from services.worker.engine.layers.rotary import rotary_frequencies, rotate
from services.worker.engine.models.registry import ARCHITECTURES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        YARN,
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**YARN, "truncate": False, "beta_fast": 24, "beta_slow": 2},
        {**YARN, "attention_factor": 0.8},
    ],
)
def test_frequencies_equal_transformers(scaling: dict[str, Any]) -> None:
    settings = {
        "vocab_size": 8,
        "hidden_size": 512,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500_000.0, **scaling},
    }
    reference = LlamaConfig(**settings)
    expected, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, torch.device("cpu"))
    config = ARCHITECTURES["LlamaForCausalLM"](reference.to_dict(), "LlamaForCausalLM")
    frequencies, own_amplitude = rotary_frequencies(config.rope, config.context_length)
    torch.testing.assert_close(frequencies, expected)
    assert own_amplitude == pytest.approx(amplitude)


def test_dynamic_frequencies_are_those_of_the_longest_sequence() -> None:
    settings = {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 3.0},
    }
    reference = LlamaConfig(**settings)
    config = ARCHITECTURES["LlamaForCausalLM"](reference.to_dict(), "LlamaForCausalLM")
    for length in (100, 1024, 2500):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](reference, torch.device("cpu"), length)
        torch.testing.assert_close(rotary_frequencies(config.rope, length)[0], expected)


def test_rotation_keeps_length_and_depends_on_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, generator=generator)
    angles = torch.outer(torch.arange(50.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, angles[position].cos(), angles[position].sin())

    assert at(q, 9).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    near = (at(q, 9) * at(k, 4)).sum()
    far = (at(q, 49) * at(k, 44)).sum()
    assert near.item() == pytest.approx(far.item(), abs=1e-4)
