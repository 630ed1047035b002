"""FP8 kernels against the torch reference, and an engine in FP8 against its bf16 self."""

import pytest
import torch
import torch.nn.functional as F

from services.worker.engine.kv.pool import gather_pages, write_tokens
from services.worker.engine.layers.fp8 import quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOKENS = pytest.mark.parametrize("num_tokens", [1, 3, 32, 33, 257])


@pytest.fixture(autouse=True, scope="module")
def kernels():
    return pytest.importorskip("services.worker.engine.kernels.fp8")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@TOKENS
@pytest.mark.parametrize("size", [48, 896, 4096, 14336])
def test_rows_are_quantized_as_the_reference_does(kernels, num_tokens: int, size: int) -> None:
    x = randn(num_tokens, size + 16)[:, :size] * randn(num_tokens, 1).exp()
    x[0] = 0
    values, scales = kernels.quantize_rows(x)
    expected_values, expected_scales = quantize_rows(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))


@TOKENS
@pytest.mark.parametrize("size", [48, 4096, 14336])
def test_rounding_with_what_comes_before_changes_nothing(
    kernels, num_tokens: int, size: int
) -> None:
    fused = pytest.importorskip("services.worker.engine.kernels.fused")
    x, residual, weight = randn(num_tokens, size), randn(num_tokens, size), randn(size)
    assert_same(kernels.rms_norm(x, None, weight, 1e-5), fused.rms_norm(x, weight, 1e-5))
    total = x.clone()
    normed = fused.add_rms_norm(total, residual, weight, 1e-5)
    assert_same(kernels.rms_norm(x, residual, weight, 1e-5), normed)
    assert torch.equal(x, total)
    gate_up = randn(num_tokens, 2 * size)
    assert_same(kernels.silu_mul(gate_up), fused.silu_mul(gate_up))


def assert_same(rows: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> None:
    """`rows` are `expected`, rounded; sums in another order may move a few by a step."""
    values, scales = quantize_rows(expected)
    torch.testing.assert_close(rows[1], scales, rtol=2**-7, atol=0)
    differ = (rows[0].float() != values.float()).float().mean()
    assert differ < 0.02
    torch.testing.assert_close(
        rows[0].float() * rows[1], values.float() * scales, rtol=0.14, atol=1e-3
    )


@TOKENS
@pytest.mark.parametrize("sizes", [(48, 112), (6144, 4096), (1024, 14336)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_rounded_numbers(
    kernels, num_tokens: int, sizes: tuple[int, int], has_bias: bool
) -> None:
    x, bias = randn(num_tokens, sizes[1]), randn(sizes[0]) if has_bias else None
    weight, scale = quantize_rows(randn(*sizes, dtype=torch.float32))
    out = kernels.product(x, weight, scale[:, 0].contiguous(), bias)
    widened = weight.double() * scale
    wide_bias = None if bias is None else bias.double()
    values, x_scale = quantize_rows(x)
    rounded = F.linear(values.double() * x_scale, widened, wide_bias)
    exact = F.linear(x.double(), widened, wide_bias)
    # Few tokens are not rounded to FP8; either way the output is rounded to bf16.
    expected = exact if num_tokens <= kernels.FEW_TOKENS else rounded
    error = (out.double() - expected) / expected.std()
    # The tensor cores add FP8 products in fewer bits than float32 has, so single sums of very
    # many are off by more than the output's rounding.
    assert float(error.square().mean().sqrt()) < 0.01
    assert float(error.abs().max()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_keys_and_values_are_cast_and_saturate(dtype: torch.dtype) -> None:
    fused = pytest.importorskip("services.worker.engine.kernels.fused")
    qkv = randn(300, 11, 96)
    qkv[:, 5:] *= 1e5
    qkv[100:, 5:8] *= 1e-5
    cos, sin = randn(2, 300, 1, 48)
    locations = torch.randperm(1600, device="cuda")[:300]
    exact = torch.zeros(2, 100, 16, 3, 96, dtype=qkv.dtype, device="cuda")
    pool = exact.to(dtype)
    expected = pool.clone()
    for kept in (exact, pool):
        fused.rotate_and_write(qkv.flatten(1), cos, sin, kept[0], kept[1], locations, None, 0.0)
    for index in range(2):
        write_tokens(expected[index], locations, exact[index].flatten(0, 1)[locations])
    assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))
    for kept in pool:
        written = gather_pages(kept, torch.arange(100, device="cuda"), torch.bfloat16)
        assert float(written.abs().max()) == torch.finfo(dtype).max
