"""A config.json that is no decoder's is refused with a sentence that names the field."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.common.model_files import builtin_model_path, eos_token_ids
from services.worker.engine.models.registry import load_model_config


def write(folder: Path, **changes: Any) -> Path:
    raw = json.loads((builtin_model_path() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer, got -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer, got '2'"),
        ({"head_dim": "128"}, "head_dim must be a positive integer"),
        ({"head_dim": 7}, "heads of 7 numbers"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ({"architectures": [1]}, "architectures must be a list of names"),
        ({"rope_parameters": ["x"]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number"),
        ({"quantization_config": [1]}, "quantization_config must be an object"),
    ],
)
def test_a_field_that_makes_no_model_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        load_model_config(write(tmp_path, **changes))


@pytest.mark.parametrize("ids", ["x", {"a": 1}, [1, None]])
def test_ids_that_end_a_sequence_are_integers(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(ValueError, match="eos_token_id must be ids"):
        eos_token_ids(write(tmp_path, eos_token_id=ids), tmp_path)
