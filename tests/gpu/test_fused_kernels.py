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


def sizes_of_products(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What a rotation adds up, without signs."""
    (first, second), c, s = x.abs().chunk(2, dim=-1), cos.abs(), sin.abs()
    return torch.cat((first * c + second * s, second * c + first * s), dim=-1)


@SIZES
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(32, 8, 128), (14, 2, 64), (7, 1, 96), (8, 4, 256), (71, 1, 64), (5, 5, 80)],
)
def test_rotation_and_write_of_keys_and_values(
    fused, num_tokens: int, has_norms: bool, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    num_padding = num_tokens // 3
    qkv = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = randn(2, num_tokens, 1, head_dim // 2)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k, weights = q.double(), k.double(), None
    if has_norms:
        weights = (randn(head_dim), randn(head_dim))
        q, k = (
            F.rms_norm(x, (head_dim,), weight.double(), 1e-6)
            for x, weight in zip((q, k), weights, strict=True)
        )
    # Two products may cancel out, but each has the roundings of its factors: with norms, after the
    # norm and after its weight as well.
    bounds = [sizes_of_products(x, cos.double(), sin.double()) * 2**-6 + 1e-6 for x in (q, k)]
    q, k = (rotate(x, cos.double(), sin.double()) for x in (q, k))

    pool = randn(2, 101, 16, num_kv_heads, head_dim)
    before = pool.clone().flatten(1, 2)
    # The last tokens are padding, which all goes to the first place of the last page.
    locations = torch.randperm(1600, device="cuda")[:num_tokens]
    locations[num_tokens - num_padding :] = 1600
    out = fused.rotate_and_write(
        qkv.flatten(1), cos, sin, pool[0], pool[1], locations, weights, 1e-6
    )
    assert ((out.double() - q).abs() <= bounds[0]).all()
    keys, values = pool.flatten(1, 2)
    own = slice(0, num_tokens - num_padding)
    assert ((keys[locations[own]].double() - k[own]).abs() <= bounds[1][own]).all()
    assert torch.equal(values[locations[own]], v[own])
    untouched = torch.ones(len(keys), dtype=torch.bool, device="cuda")
    untouched[locations] = False
    assert torch.equal(pool.flatten(1, 2)[:, untouched], before[:, untouched])
