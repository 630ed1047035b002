"""Loading Hugging Face tokenizer directories, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from services.tokenizer.encode import Encoder, Text
from services.tokenizer.tokenizer_files import load_tokenizer
from tests.unit.tokenizer import vocabularies


def save(path: Path, config: dict[str, Any], *, with_bos: bool = False) -> Path:
    spec = vocabularies.byte_level().to_str()
    tokenizer = type(vocabularies.byte_level()).from_str(spec)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path / "tokenizer.json"))
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eos|>", "special": True},
        "unk_token": None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps({**defaults, **config}))
    return path


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]
)
def test_special_tokens_go_around_text_as_in_transformers(
    tmp_path: Path, config: dict[str, Any], with_bos: bool
) -> None:
    path = save(tmp_path, config, with_bos=with_bos)
    encoder = Encoder(load_tokenizer(path))
    reference = AutoTokenizer.from_pretrained(path)
    for text in ("Grüße aus Köln", ""):
        [special, bare] = encoder.encode([Text(text, True), Text(text, False)])
        assert special == reference.encode(text)
        assert bare == reference.encode(text, add_special_tokens=False)


def test_special_tokens_are_given_to_templates(tmp_path: Path) -> None:
    loaded = load_tokenizer(save(tmp_path, {"additional_special_tokens": [{"content": "<x>"}]}))
    assert loaded.special_tokens == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "additional_special_tokens": ["<x>"],
    }
    assert loaded.bos_token_id == loaded.tokenizer.token_to_id("<|bos|>")


def test_the_special_tokens_map_fills_what_the_configuration_lacks(tmp_path: Path) -> None:
    save(tmp_path, {})
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>"}')
    assert load_tokenizer(tmp_path).special_tokens == {"eos_token": "<|eos|>"}
    assert load_tokenizer(tmp_path).bos_token_id is None


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model but no.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_an_empty_directory_and_a_broken_file_are_errors_that_name_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be loaded"):
        load_tokenizer(tmp_path)
