"""Every family against transformers: log-probabilities of a prompt, and greedy tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from services.common.model_files import builtin_model_path
from services.worker.engine.batch import PromptLogprobRequest
from services.worker.engine.messages import LogprobSpec
from tests.fakes.checkpoints import VOCAB_SIZE, greedy_ids, write_checkpoint
from tests.fakes.engines import open_driver
from tests.fakes.step_driver import StepDriver

PROMPT = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(37)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-no-gqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-default-head-dim": ("Llama", {"head_dim": None}),
    "llama3-rope": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 5000.0}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-dynamic-rope": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "llama-yarn-rope": ("Llama", {"rope_scaling": YARN}),
    "llama-yarn-rope-scaled": (
        "Llama",
        {"rope_scaling": {**YARN, "beta_fast": 16, "attention_factor": 1.3, "truncate": False}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window-in-upper-layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "seed-oss": ("SeedOss", {}),
    "seed-oss-output-biases": ("SeedOss", {"attention_out_bias": True, "mlp_bias": True}),
    "qwen3-tied-window": (
        "Qwen3",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
}


def prompt_logprobs(driver: StepDriver, prompt: list[int]) -> torch.Tensor:
    """[len - 1, V] log-probabilities of every token after each prefix of the prompt."""
    spec = LogprobSpec(prompt_start=1, token_ids=tuple(range(VOCAB_SIZE)))
    sequence = driver.start(prompt, logprobs=spec)
    request = PromptLogprobRequest(
        row=0, start=1, stop=len(prompt), token_ids=prompt[1:], spec=spec
    )
    result = driver.step([(sequence, len(prompt))], [request])
    return torch.tensor(result.prompt_logprobs[0].requested_logprobs).view(-1, VOCAB_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_a_family_equals_transformers(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    reference = write_checkpoint(tmp_path, family, **changes)
    driver = open_driver(tmp_path)
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPT])).logits[0, :-1]
    difference = (prompt_logprobs(driver, PROMPT) - logits.log_softmax(-1)).abs().max()
    assert difference < 1e-4
    assert driver.generate([driver.start(PROMPT)], 24) == [greedy_ids(reference, PROMPT, 24)]


def test_the_classic_configuration_means_the_same(tmp_path: Path) -> None:
    """Rewritten as older versions of transformers wrote it."""
    reference = write_checkpoint(tmp_path, "Llama", rope_scaling=LLAMA3, rope_theta=5000.0)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    driver = open_driver(tmp_path)
    assert driver.generate([driver.start(PROMPT)], 24) == [greedy_ids(reference, PROMPT, 24)]


def test_dynamic_rope_is_plain_within_the_original_context_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", rope_scaling={"type": "dynamic", "factor": 2.0})
    plain = prompt_logprobs(open_driver(tmp_path), PROMPT)
    stretched = prompt_logprobs(open_driver(tmp_path, context_length=512), PROMPT)
    assert (plain - stretched).abs().max() > 1e-3


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, "Llama", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    driver = open_driver(tmp_path)
    assert driver.generate([driver.start(PROMPT)], 12) == [greedy_ids(reference, PROMPT, 12)]


def test_bfloat16_stays_near_transformers(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, "Llama", initializer_range=0.1).to(torch.bfloat16)
    with torch.inference_mode():
        logits = reference(torch.tensor([PROMPT])).logits[0, :-1].float()
    driver = open_driver(tmp_path, dtype="bfloat16")
    difference = (prompt_logprobs(driver, PROMPT) - logits.log_softmax(-1)).abs().max()
    assert difference < 0.03


def test_the_built_in_model_equals_transformers() -> None:
    path = builtin_model_path()
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    driver = open_driver(path, page_size=16)
    prompts = [list(range(start, start + 9)) for start in (20, 300, 1100)]
    got = driver.generate([driver.start(prompt) for prompt in prompts], 32)
    assert got == [greedy_ids(reference, prompt, 32) for prompt in prompts]
