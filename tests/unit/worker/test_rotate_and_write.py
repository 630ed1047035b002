"""Rotation and the write of keys and values in one kernel, in Triton's interpreter."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from services.worker.engine.kernels.fused import rotate_and_write
from services.worker.engine.kv.pool import write_tokens
from services.worker.engine.layers.rotary import rotate

torch.set_num_threads(1)
torch.manual_seed(0)
PAGES, PAGE = 7, 4
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CASES = [
    # tokens, query heads, key/value heads, head size, has norms, the pool's type
    (1, 4, 4, 64, False, torch.float16),
    (5, 14, 2, 64, False, torch.float16),
    (3, 6, 2, 96, True, torch.float16),
    (4, 9, 1, 128, True, torch.float16),
    (2, 5, 5, 256, False, torch.float16),
    (6, 3, 1, 24, True, torch.float16),
    (5, 8, 2, 80, False, E4M3),
    (4, 7, 1, 96, False, E5M2),
]


def normed(x, weight):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (wide.to(x.dtype).float() * weight.float()).to(x.dtype)


# The interpreter cuts bfloat16's last bits off instead of rounding.
dtype = torch.float16
for tokens, heads, kv_heads, size, has_norms, kept in CASES:
    # Rows of a wider tensor.
    qkv = torch.randn(tokens + 2, (heads + 2 * kv_heads) * size + 16).to(dtype)[:, 16:]
    angles = torch.rand(tokens + 2, 1, size // 2) * 6
    if kept != dtype:
        # Nor does it round to FP8 as devices do: numbers and turns that need no rounding.
        qkv, angles = qkv.to(kept).to(dtype), angles.round() * (torch.pi / 2)
        qkv[:, ::7] = 60000 * qkv[:, ::7].sign()
    qkv[:, -1] = 60000
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if kept != dtype:
        cos, sin = cos.round(), sin.round()
    weights = torch.rand(2, size).to(dtype) + 0.5
    pool = torch.randn(2, PAGES, PAGE, kv_heads, size).to(kept)
    # The last two tokens are padding, which all goes to the first place of the last page.
    free = torch.randperm((PAGES - 1) * PAGE)[:tokens]
    locations = torch.cat((free, torch.full((2,), (PAGES - 1) * PAGE)))

    packed = qkv.unflatten(1, (-1, size))
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    if has_norms:
        q, k = normed(q, weights[0]), normed(k, weights[1])
    q, k = (rotate(x.float(), cos.float(), sin.float()).to(dtype) for x in (q, k))
    expected = pool.clone()
    write_tokens(expected[0], free, k)
    write_tokens(expected[1], free, v)

    out = rotate_and_write(
        qkv, cos, sin, pool[0], pool[1], locations, tuple(weights) if has_norms else None, 1e-6
    )
    case = (tokens, heads, kv_heads, size, has_norms, kept)
    assert out.shape == (tokens + 2, heads, size) and out.is_contiguous(), case
    # A norm's sum may end in another bit; the rest is the same arithmetic.
    bound = 2 * torch.finfo(dtype).eps if has_norms else 0.0
    torch.testing.assert_close(out.float(), q.float(), rtol=bound, atol=bound)
    assert pool[:, -1, 0].float().isfinite().all(), case
    pool[:, -1, 0] = expected[:, -1, 0]
    torch.testing.assert_close(pool[0].float(), expected[0].float(), rtol=bound, atol=bound)
    assert torch.equal(pool[1].float(), expected[1].float()), case
    assert pool[1].float().max() == min(torch.finfo(kept).max, 60000), case
"""

# Compiled for compute capability 9.0, which needs no GPU.
COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from services.worker.engine.kernels.fused import _rotate_and_write

names = _rotate_and_write.arg_names
for size, kept, has_norm, largest in (
    (128, "bf16", False, None), (96, "bf16", True, None), (128, "fp8e4nv", True, 448.0),
    (256, "fp8e5", False, 57344.0),
):
    constants = dict(
        NUM_QUERIES=14, NUM_KEYS=2, HALF=size // 2, PADDED=triton.next_power_of_2(size // 2),
        HEADS=4, HAS_NORM=has_norm, LARGEST=largest, DEPENDENT=True,
    )
    others = {
        "keys": "*" + kept, "values": "*" + kept, "locations": "*i64", "stride": "i32",
        "eps": "fp32",
    }
    signature = {n: "constexpr" if n in constants else others.get(n, "*bf16") for n in names}
    source = triton.compiler.ASTSource(
        _rotate_and_write, signature, {(names.index(n),): value for n, value in constants.items()}
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2})
    assert "griddepcontrol.wait" in kernel.asm["ptx"]
"""


def run_program(program: str, *, interpret: bool) -> None:
    pytest.importorskip("triton")
    # The interpreter must be chosen before the kernel's module is imported.
    done = subprocess.run(
        ["env", f"TRITON_INTERPRET={int(interpret)}", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_queries_keys_and_values_are_the_torch_paths() -> None:
    run_program(PROGRAM, interpret=True)


def test_every_variant_compiles() -> None:
    run_program(COMPILATION, interpret=False)
