"""Digests of a model directory: equal for equal content, different for any change that matters."""

import json
from pathlib import Path

import pytest

from services.common.model_files import (
    chat_template_digest,
    eos_token_ids,
    model_revision,
    tokenizer_digest,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    tokenizer = {"added_tokens": [{"id": 9, "content": "<|end|>"}, {"id": 1, "content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"})
    )
    (tmp_path / "model.safetensors").write_bytes(bytes(300_000))
    return tmp_path


def test_eos_ids_come_from_configs_and_tokenizer(model: Path) -> None:
    assert eos_token_ids(model, model) == [2, 7, 9]


@pytest.mark.parametrize("place", [0, 299_999])
def test_changed_weights_change_the_revision(model: Path, place: int) -> None:
    before = model_revision(model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[place] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert model_revision(model) != before


def test_a_changed_tokenizer_changes_its_digest(model: Path) -> None:
    before = tokenizer_digest(model)
    (model / "tokenizer.json").write_text("{}")
    assert tokenizer_digest(model) != before


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tokenizer_digest(tmp_path)


def test_an_override_changes_the_template_digest(model: Path, tmp_path: Path) -> None:
    own = chat_template_digest(model, None)
    file = tmp_path / "template.jinja"
    file.write_text("other")
    assert len({own, chat_template_digest(model, str(file)), chat_template_digest(model, "x")}) == 3


def test_no_template_has_an_empty_digest(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    assert chat_template_digest(model, None) == ""


def test_malformed_json_is_named(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        eos_token_ids(model, model)
