"""FP8 linear layers: rounding, products, and every kind of checkpoint that is read or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.worker.engine.distributed.group import SoloGroup
from services.worker.engine.layers.fp8 import FP8_DTYPE, Fp8Matrix, Fp8Scheme, quantize_rows
from services.worker.engine.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from services.worker.engine.layers.matrix import DenseMatrix, check_features, make_matrix
from services.worker.engine.layers.parameters import Placement
from services.worker.engine.messages import LogprobSpec
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.engines import open_driver, open_runner

PROMPT = [5, 9, 40, 2, 77, 3]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "Llama")
    return tmp_path


def placement(scheme: Fp8Scheme | None = None) -> Placement:
    return Placement(torch.device("cpu"), torch.float32, SoloGroup(), scheme)


def test_values_times_scales_are_within_half_a_step() -> None:
    x = torch.randn(50, 64) * torch.randn(50, 1).exp()
    values, scales = quantize_rows(x)
    assert values.dtype == FP8_DTYPE
    error = (values.float() * scales - x).abs()
    # 3 bits of mantissa; below the smallest normal number, steps of 2 ** -9.
    assert bool((error <= x.abs() / 16 + scales * 2**-10).all())
    assert values.float().abs().amax(1).tolist() == [448.0] * 50


def test_rows_of_zeros_and_tiny_rows_stay_finite() -> None:
    values, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1e-38, -1e-38]]))
    assert bool((values.float().abs() <= 448).all())
    assert bool((scales > 0).all())


def test_the_kernels_compute_what_the_reference_does() -> None:
    """In Triton's interpreter, whose own cast to FP8 loses carries: the cast is torch's here."""
    script = """
import torch
from services.worker.engine.kernels import fp8, fused
from services.worker.engine.layers.fp8 import quantize_rows

values, scales = torch.empty(40, 200), torch.empty(40, 1)

def check(x):
    expected, expected_scales = quantize_rows(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), expected.float())

x = torch.randn(40, 250).bfloat16()[:, :200] * torch.randn(40, 1).exp().bfloat16()
x[0] = 0
fp8._quantize[(40,)](x, values, scales, x.stride(0), 200, BLOCK=256)
check(x)
x, residual, weight = (torch.randn(size).bfloat16() for size in ((40, 200), (40, 200), 200))
total = x.clone()
normed = fused.add_rms_norm(total, residual, weight, 1e-5)
fp8._norm_quantize[(40,)](
    x, residual, weight, values, scales, 1e-5, 200, HAS_RESIDUAL=True, BLOCK=256
)
check(normed)
assert torch.equal(x, total)
gate_up = torch.randn(40, 400).bfloat16()
fp8._silu_mul_quantize[(40,)](gate_up, values, scales, 200, BLOCK=256)
check(fused.silu_mul(gate_up))
"""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=100)


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    matrix = Fp8Matrix(24, 48, Fp8Scheme(), placement())
    weight, x, bias = torch.randn(24, 48), torch.randn(7, 48), torch.randn(24)
    rows = slice(0, 24)
    matrix.load("weight", weight, target=rows, rows=rows, columns=slice(None))
    values, scales = quantize_rows(weight)
    x_values, x_scales = quantize_rows(x)
    rounded = values.double() * scales, x_values.double() * x_scales
    expected = rounded[1] @ rounded[0].t() + bias
    torch.testing.assert_close(matrix.multiply(x, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_ranks_that_share_rows_agree_on_their_scales() -> None:
    weight = torch.randn(32, 64)
    whole = RowParallelLinear("o", 64, 32, bias=False, placement=placement(Fp8Scheme()))
    whole.load("o.weight", weight)
    x = torch.randn(5, 64)
    halves = []
    for rank in range(2):
        group = SoloGroup()
        group.rank, group.size = rank, 2  # type: ignore[misc]
        part = RowParallelLinear(
            "o",
            64,
            32,
            bias=False,
            placement=Placement(torch.device("cpu"), torch.float32, group, Fp8Scheme()),
        )
        part.load("o.weight", weight)
        halves.append(part)
    # Activations are scaled by what each rank sees of them, so rows with equal halves.
    x = torch.cat((x[:, :32], x[:, :32]), dim=1)
    total = halves[0].forward(x[:, :32]) + halves[1].forward(x[:, 32:])
    torch.testing.assert_close(total, whole.forward(x), rtol=1e-5, atol=1e-5)


def test_scales_of_one_tensor_serve_each_of_its_outputs() -> None:
    """As when a fused layer's parts have one scale each."""
    scheme = Fp8Scheme(checkpoint_scales="tensor")
    layer = ColumnParallelLinear(
        (Part("gate_proj", 16), Part("up_proj", 8)), 32, bias=False, placement=placement(scheme)
    )
    assert layer.tensors()["up_proj.weight_scale"] == ()
    gate, up = torch.randn(16, 32).to(FP8_DTYPE), torch.randn(8, 32).to(FP8_DTYPE)
    layer.load("gate_proj.weight", gate)
    layer.load("up_proj.weight", up)
    layer.load("gate_proj.weight_scale", torch.tensor([0.5]))
    layer.load("up_proj.weight_scale", torch.tensor(3.0))
    values, scales = quantize_rows(torch.randn(4, 32))
    weight = torch.cat((gate.float() * 0.5, up.float() * 3.0))
    expected = (values.float() * scales) @ weight.t()
    torch.testing.assert_close(
        layer.forward(values.float() * scales), expected, rtol=1e-4, atol=1e-4
    )


def test_ignored_layers_stay_as_they_are() -> None:
    scheme = Fp8Scheme(ignored=("model.layers.0.mlp", r"re:.*\.o_proj$"))
    kinds = {
        name: type(make_matrix([name], 16, 16, placement(scheme)))
        for name in (
            "model.layers.0.mlp.down_proj",
            "model.layers.10.mlp.down_proj",
            "model.layers.5.self_attn.o_proj",
        )
    }
    assert list(kinds.values()) == [DenseMatrix, Fp8Matrix, DenseMatrix]


def test_parts_of_a_fused_layer_must_agree() -> None:
    scheme = Fp8Scheme(ignored=("a.up_proj",))
    with pytest.raises(ValueError, match=r"a\.gate_proj, a\.up_proj are multiplied as one"):
        make_matrix(["a.gate_proj", "a.up_proj"], 16, 16, placement(scheme))


def test_features_that_cannot_be_aligned_are_named() -> None:
    check_features(["x"], 32, 16)
    with pytest.raises(ValueError, match="down_proj: FP8 needs features in multiples of 16"):
        check_features(["down_proj"], 32, 24)


def compressed_tensors(strategy: str, activations: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**FP8, "strategy": strategy, "dynamic": False},
                "input_activations": activations or {**FP8, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }


STATIC = {**FP8, "strategy": "tensor", "dynamic": False}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "compressed-tensors, channel": (compressed_tensors("channel"), "weight_scale"),
    "compressed-tensors, tensor": (compressed_tensors("tensor", STATIC), "weight_scale"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale"),
    "fp8, inv": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_scale_inv"),
}


def configure(model_path: Path, quantization: dict[str, Any]) -> None:
    path = model_path / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": quantization}
    path.write_text(json.dumps(config))


def quantize_checkpoint(model_path: Path, quantization: dict[str, Any], scale_name: str) -> None:
    """Write the checkpoint's linear layers in FP8 with scales of that kind, and static scales."""
    configure(model_path, quantization)
    groups = quantization.get("config_groups", {})
    per_channel = bool(groups) and groups["group_0"]["weights"]["strategy"] == "channel"
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not module.endswith(LINEAR):
            continue
        weight = tensors[name]
        if per_channel:
            tensors[name], scale = quantize_rows(weight)
        else:
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(FP8_DTYPE)
        tensors[f"{module}.{scale_name}"] = scale
        tensors[f"{module}.input_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(())
    save_file(tensors, file, metadata={"format": "pt"})


def spread_scales(model_path: Path) -> None:
    """State the scales of tensors as those of channels."""
    configure(model_path, compressed_tensors("channel"))
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".weight_scale" in name]:
        module = name.rpartition(".")[0]
        scale = tensors.pop(name).reshape(1, 1)
        tensors[f"{module}.weight_scale"] = scale.repeat(len(tensors[f"{module}.weight"]), 1)
    save_file(tensors, file, metadata={"format": "pt"})


def answer(model_path: Path, **options: Any) -> tuple[list[int], list[float]]:
    """The ids that follow the prompt, and the first one's log-probability."""
    driver = open_driver(model_path, **options)
    sequence = driver.start(PROMPT, logprobs=LogprobSpec(output=True))
    logprobs = driver.step([(sequence, len(PROMPT))]).output_logprobs[0].logprobs
    return driver.generate([sequence], 7)[0], logprobs


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_checkpoints_load(
    model_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rounded_here = answer(model_path, quantization="fp8")
    quantize_checkpoint(model_path, *KINDS[kind])
    loaded = answer(model_path)
    assert "event=checkpoint_scales_unused count=22" in caplog.text
    assert answer(model_path, quantization="fp8") == loaded
    if "channel" in kind:
        # The same rounding, done before.
        assert loaded == rounded_here
    else:
        # One scale for all of a matrix is the same scale for each of its outputs.
        spread_scales(model_path)
        assert answer(model_path) == loaded


def test_an_fp8_checkpoint_can_be_asked_for_with_dummy_weights(model_path: Path) -> None:
    configure(model_path, compressed_tensors("channel"))
    (model_path / "model.safetensors").unlink()
    assert answer(model_path, load_format="dummy")


def test_a_missing_scale_is_named(model_path: Path) -> None:
    quantize_checkpoint(model_path, *KINDS["fp8"])
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight_scale"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lacks tensors: .*layers\.1\.self_attn\.k_proj"):
        open_runner(model_path)


def test_weights_that_are_not_fp8_after_all_are_refused(model_path: Path) -> None:
    quantize_checkpoint(model_path, *KINDS["fp8"])
    file = model_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"float8_e4m3fn, a weight is torch\.float32"):
        open_runner(model_path)


def group_with(**changes: Any) -> dict[str, Any]:
    settings = compressed_tensors("channel")
    settings["config_groups"]["group_0"].update(changes)
    return settings


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"weight_block_size \[128"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme 'none'"),
        ({**compressed_tensors("channel"), "format": "pack-quantized"}, "format 'pack-quantized'"),
        ({**compressed_tensors("channel"), "config_groups": {}}, "0 config_groups"),
        (compressed_tensors("block"), "weights with strategy 'block'"),
        (group_with(input_activations=None), "weights alone in FP8"),
        (group_with(targets=["re:.*mlp.*"]), "targets"),
        (group_with(output_activations=dict(FP8)), "output_activations"),
        (group_with(weights={**FP8, "type": "int"}), "weights of type 'int' with 8 bits"),
        (group_with(weights={**FP8, "symmetric": False}), "symmetric False"),
    ],
)
def test_checkpoints_that_are_not_supported_say_what_is(
    model_path: Path, quantization: dict[str, Any], reason: str
) -> None:
    configure(model_path, quantization)
    with pytest.raises(ValueError, match=rf"{reason}.* is not supported; supported: FP8 \(E4M3\)"):
        open_runner(model_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization": "awq"}, "quantization must be fp8, got 'awq'"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype must be auto, fp8_e4m3 or fp8_e5m2"),
    ],
)
def test_unknown_formats_are_refused(
    model_path: Path, changes: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        open_runner(model_path, **changes)
