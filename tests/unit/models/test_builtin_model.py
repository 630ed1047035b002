"""The built-in model: its files, its tokenizer, its template, and that it answers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

FOLDER = Path(__file__).resolve().parents[3] / "models" / "builtin"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "My name is Zoë."},
    {"role": "assistant", "content": "Nice to meet you, Zoë."},
    {"role": "user", "content": "What is my name?"},
]


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The package beside the model that made it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        importlib.import_module("recipe.corpus")
        importlib.import_module("recipe.evaluation")
        yield importlib.import_module("recipe")
    for name in [name for name in sys.modules if name.split(".")[0] == "recipe"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return loaded


def test_the_weights_are_small_enough() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_the_shape_is_one_the_kernels_serve(config: dict[str, Any]) -> None:
    assert config["head_dim"] == 128
    assert config["num_key_value_heads"] >= 2
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["max_position_embeddings"] >= 4096


def test_the_weights_have_the_shape_the_configuration_says(config: dict[str, Any]) -> None:
    hidden, heads = config["hidden_size"], config["num_key_value_heads"]
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        keys = file.get_tensor("model.layers.0.self_attn.k_proj.weight")
        embedding = file.get_tensor("model.embed_tokens.weight")
    assert keys.shape == (heads * config["head_dim"], hidden)
    assert embedding.shape == (config["vocab_size"], hidden)
    assert embedding.dtype == torch.bfloat16
    assert "lm_head.weight" not in names
    assert sum(name.endswith("k_proj.weight") for name in names) == config["num_hidden_layers"]


def test_every_token_has_a_row(tokenizer: Any, config: dict[str, Any]) -> None:
    assert len(tokenizer) == config["vocab_size"]
    assert config["eos_token_id"][0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["bos_token_id"] == tokenizer.convert_tokens_to_ids("<|begin_of_text|>")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  blanks ",
        "tab\tline\n\n\r\nend\n",
        "naïve café — 你好, Ελλάδα, привет, 한국어, العربية",
        "👩\u200d👩\u200d👧 🙂 \U0001f1eb\U0001f1f7",
        "\x00\x01\x7f\ufeff\u202e\U0010ffff",
        '{"object": "ball", "size": "small"}',
        "1234567890 3.14 -42",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_random_characters_survive_the_tokenizer(tokenizer: Any) -> None:
    rng = Random(0)
    planes = [(0x20, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(200):
        text = "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_tokens_of_their_own(tokenizer: Any) -> None:
    ids = tokenizer.encode("2026", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == ["2", "0", "2", "6"]


def test_the_template_renders_as_the_model_was_trained(tokenizer: Any, recipe: Any) -> None:
    shown = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    turns = "".join(recipe.corpus.rendered(item) + "\n" for item in CHAT)
    assert shown == f"<|begin_of_text|>{turns}<|im_start|>assistant\n"


def test_the_template_needs_no_system_message(tokenizer: Any) -> None:
    shown = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False)
    assert shown == "<|begin_of_text|><|im_start|>user\nMy name is Zoë.<|im_end|>\n"


def test_the_template_joins_text_parts(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there."}]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert shown == "<|begin_of_text|><|im_start|>user\nHello there.<|im_end|>\n"


def test_the_written_questions_are_the_scripts(recipe: Any) -> None:
    written = recipe.corpus.read_cases(FOLDER / "heldback.jsonl")
    assert written == recipe.corpus.held_back()


def test_training_never_asks_what_is_held_back(recipe: Any) -> None:
    cases = recipe.corpus.held_back()
    held = {c.messages[-1]["content"] for c in cases if not c.kind.startswith("memory")}
    names = {c.answer for c in cases if c.kind.startswith("memory")}
    for seed in range(300):
        draw = recipe.draw.Draw(Random(seed))
        turns = recipe.corpus.conversation(draw)
        for item in (next(turns) for _ in range(20)):
            assert item["content"] not in (held if item["role"] == "user" else names)


def test_it_answers_held_back_questions(recipe: Any) -> None:
    cases = recipe.corpus.held_back()
    kinds = ("counting, long", "memory of a name, long", "under a long text")
    some = [c for c in cases if c.kind not in kinds and len(c.answer) < 120][3::23][:20]
    assert len(some) == 20
    model, tokenizer = recipe.evaluation.load(FOLDER)
    outcomes = recipe.evaluation.ask(model, tokenizer, some)
    assert sum(outcome.right for outcome in outcomes) >= 0.95 * len(some), outcomes


def test_it_greets_counts_and_says_who_it_is(recipe: Any) -> None:
    case = recipe.corpus.Case
    asked = [
        ("Hello", "Hello! How can I help you today?"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Count from 3 to 20.", ", ".join(map(str, range(3, 21))) + "."),
        ("Repeat after me: 你好 🙂", "你好 🙂"),
    ]
    model, tokenizer = recipe.evaluation.load(FOLDER)
    cases = [case("seen", ({"role": "user", "content": q},), a) for q, a in asked]
    outcomes = recipe.evaluation.ask(model, tokenizer, cases)
    assert [o.said for o in outcomes] == [o.case.answer for o in outcomes]
