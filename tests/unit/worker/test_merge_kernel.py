"""The merge kernel's arithmetic, in Triton's interpreter."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from services.worker.engine.kernels.merge import merge_attention

torch.set_num_threads(1)
torch.manual_seed(0)
for rows, heads, size in ((3, 5, 64), (2, 8, 128), (4, 12, 96)):
    own, shared = torch.randn(2, rows, heads, size)
    own_lse, shared_lse = 4 * torch.randn(2, rows, heads)
    shared_lse[0] = -torch.inf
    shared[0] = torch.nan
    own_weight, weight = torch.exp2(own_lse), torch.exp2(shared_lse)
    expected = (own_weight[..., None] * own + weight[..., None] * shared.nan_to_num()) / (
        own_weight + weight
    )[..., None]
    for name, dtype, bound in (("float32", torch.float32, 1e-5), ("half", torch.float16, 4e-3)):
        out = own.to(dtype, copy=True)
        merge_attention(out, own_lse, shared.to(dtype), shared_lse)
        assert out.dtype == dtype
        worst = (out.float() - expected).abs().max().item()
        assert worst < bound, (name, rows, heads, size, worst)
"""


def test_merged_outputs_are_those_over_both_sets_of_keys() -> None:
    pytest.importorskip("triton")
    # The interpreter must be chosen before the kernel's module is imported.
    done = subprocess.run(
        ["env", "TRITON_INTERPRET=1", sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
