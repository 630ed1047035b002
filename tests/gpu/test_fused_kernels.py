"""Each fused kernel against the torch path in float64."""

import pytest
import torch
import torch.nn.functional as F

from services.worker.engine.layers.rotary import rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Two roundings to bf16's 8 bits.
TOLERANCE = {"atol": 1e-2, "rtol": 1e-2}
SIZES = pytest.mark.parametrize("num_tokens", [1, 3, 64, 1000])


@pytest.fixture(autouse=True, scope="module")
def fused():
    return pytest.importorskip("services.worker.engine.kernels.fused")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


@SIZES
@pytest.mark.parametrize("size", [256, 896, 4096, 5120])
def test_norms(fused, num_tokens: int, size: int) -> None:
    x, residual, weight = randn(num_tokens, size), randn(num_tokens, size), randn(size)
    expected = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5).double(), expected, **TOLERANCE)
    total = x + residual
    expected = F.rms_norm(total.double(), (size,), weight.double(), 1e-5)
    out = fused.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    assert torch.equal(x, total)


@SIZES
@pytest.mark.parametrize("size", [48, 768, 14336])
def test_gated_activation(fused, num_tokens: int, size: int) -> None:
    gate_up = randn(num_tokens, 2 * size)
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(fused.silu_mul(gate_up).double(), F.silu(gate) * up, **TOLERANCE)


@SIZES
@pytest.mark.parametrize(("num_heads", "head_dim"), [(40, 128), (3, 64), (7, 96), (10, 256)])
def test_rotation(fused, num_tokens: int, num_heads: int, head_dim: int) -> None:
    x = randn(num_tokens, num_heads + 5, head_dim)[:, :num_heads]
    cos, sin = randn(num_tokens, 1, head_dim // 2), randn(num_tokens, 1, head_dim // 2)
    expected = rotate(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(fused.rotate(x, cos, sin).double(), expected, **TOLERANCE)


@SIZES
@pytest.mark.parametrize(("num_heads", "head_dim"), [(16, 128), (3, 64), (7, 96)])
def test_rotation_of_normed_heads(fused, num_tokens: int, num_heads: int, head_dim: int) -> None:
    x = randn(num_tokens, num_heads + 5, head_dim)[:, : num_heads + 2]
    cos, sin = randn(num_tokens, 1, head_dim // 2), randn(num_tokens, 1, head_dim // 2)
    weights = randn(2, head_dim)
    normed = F.rms_norm(x.double(), (head_dim,), None, 1e-6)
    normed[:, :num_heads] *= weights[0].double()
    normed[:, num_heads:] *= weights[1].double()
    expected = rotate(normed, cos.double(), sin.double())
    out = fused.norm_rotate(x, cos, sin, weights[0], weights[1], num_heads, 1e-6)
    # Rounded after the norm and after its weight as well.
    torch.testing.assert_close(out.double(), expected, atol=5e-2, rtol=2e-2)


@SIZES
def test_keys_and_values_go_to_their_places(fused, num_tokens: int) -> None:
    packed = randn(num_tokens, 12, 96)
    k, v = packed[:, 2:5], packed[:, 9:]
    pool = randn(2, 100, 16, 3, 96)
    expected = pool.clone()
    locations = torch.randperm(1600, device="cuda")[:num_tokens]
    expected[0].flatten(0, 1)[locations] = k
    expected[1].flatten(0, 1)[locations] = v
    fused.write_kv(k, v, pool[0], pool[1], locations)
    assert torch.equal(pool, expected)
