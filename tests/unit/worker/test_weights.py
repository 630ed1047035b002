"""Loading checkpoints: what is wrong is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.engines import open_driver, open_runner
from tests.fakes.step_driver import StepDriver

PROMPT = [5, 9, 40, 2]


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "Llama")
    return tmp_path


def rewrite(model_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_tensors_are_named(model_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(model_path, {name: None})
    with pytest.raises(ValueError, match=f"lacks tensors: {name}$"):
        open_runner(model_path)


def test_unexpected_tensors_are_named(model_path: Path) -> None:
    rewrite(model_path, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"does not: model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_runner(model_path)


def test_a_wrong_shape_is_named(model_path: Path) -> None:
    rewrite(model_path, {"model.norm.weight": torch.zeros(31)})
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight has shape \(31,\), expected \(32,\)"
    ):
        open_runner(model_path)


def test_leftovers_that_mean_nothing_are_ignored(model_path: Path) -> None:
    rewrite(model_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    open_runner(model_path).close()


def test_a_tied_head_in_the_checkpoint_is_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", tie_word_embeddings=True)
    expected = open_driver(tmp_path)
    rewrite(tmp_path, {"lm_head.weight": torch.zeros(96, 32)})
    again = open_driver(tmp_path)
    assert generate(expected) == generate(again)


def test_a_file_missing_from_the_index_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"lacks files of its index: {lost.name}"):
        open_runner(tmp_path)


@pytest.mark.parametrize(
    "index", [{"metadata": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}]
)
def test_an_index_without_files_is_said(model_path: Path, index: dict[str, object]) -> None:
    (model_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        open_runner(model_path)


def test_numbers_that_are_no_floats_are_refused(model_path: Path) -> None:
    rewrite(model_path, {"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has type torch\.int32"):
        open_runner(model_path)


def test_fp8_weights_that_the_configuration_does_not_announce_are_refused(
    model_path: Path,
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(model_path / "model.safetensors")[name]
    rewrite(model_path, {name: stored.to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match="config.json has no quantization_config"):
        open_runner(model_path)


def test_no_weights_at_all(model_path: Path) -> None:
    (model_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors files in"):
        open_runner(model_path)


def test_a_truncated_file_is_named(model_path: Path) -> None:
    file = model_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        open_runner(model_path)


def test_progress_rises_to_one(model_path: Path) -> None:
    seen: list[float] = []
    options = EngineOptions(model_path=model_path, tokenizer_path=model_path, device="cpu")
    build_runner(options, lambda fraction, what: seen.append(fraction))
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[-1] == 1.0


def test_dummy_weights_need_only_a_configuration(model_path: Path) -> None:
    (model_path / "model.safetensors").unlink()
    first = generate(open_driver(model_path, load_format="dummy"))
    assert first == generate(open_driver(model_path, load_format="dummy"))


def test_an_unknown_load_format_is_refused(model_path: Path) -> None:
    with pytest.raises(ValueError, match="load_format must be one of"):
        open_runner(model_path, load_format="pickle")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: L"),
        ({"architectures": None}, r"\(none named\) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"vocab_size": None}, "vocab_size must be a positive integer"),
        ({"quantization_config": {"bits": 4}}, "quant_method None is not supported"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "rope scaling 'su'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a number, got None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"dtype": "float8"}, "dtype 'float8'"),
    ],
)
def test_a_configuration_that_is_not_supported_says_why(
    model_path: Path, changes: dict[str, object], reason: str
) -> None:
    path = model_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=reason):
        open_runner(model_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context_length": 257}, "context_length 257 exceeds the model's longest, 256"),
        ({"attention_backend": "nope"}, "attention_backend 'nope' is unknown; known: flashinfer"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"device": "tpu"}, "device must be"),
        ({"tp_size": 0}, "tp_size must be >= 1"),
        ({"enable_torch_compile": True}, "enable_torch_compile needs a GPU"),
        ({"tp_size": 3}, "tp_size 3 does not divide the model's 4 attention heads"),
    ],
)
def test_options_that_cannot_work_say_why(
    model_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        open_runner(model_path, **changes)


def generate(driver: StepDriver) -> list[list[int]]:
    return driver.generate([driver.start(PROMPT)], 8)
