"""The arithmetic of the kernels for few tokens, in Triton's interpreter on the CPU."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Several tokens in float16 only: the interpreter multiplies matrices with numpy, which has no
# bfloat16.
PROGRAM = """
import torch
from tests.fakes.few_tokens import Case, relative_error, run
torch.set_num_threads(1)
for seed in range(12):
    for num_tokens, dtype, bound in (
        (1, torch.bfloat16, 1e-2), (1, torch.float16, 1e-3), (2 + seed, torch.float16, 1e-3),
        (33 + seed, torch.float16, 1e-3),
    ):
        case = Case.random(
            torch.Generator().manual_seed(seed), num_tokens=num_tokens, dtype=dtype, device="cpu",
            max_rows=80, max_size=600,
        )
        error = relative_error(case, run(case))
        assert error < bound, (case, dtype, error)
print("done")
"""


def test_products_norms_gates_and_residuals() -> None:
    result = subprocess.run(
        ["env", "TRITON_INTERPRET=1", sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr


# Compiled for compute capability 9.0, which needs no GPU.
SHARED_PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from services.worker.engine.kernels.matvec import MAX_TOKENS, SHARED_BYTES, _few_tokens, choose_tile
tile = choose_tile(MAX_TOKENS, 8192, 4096)
constants = dict(
    K=4096, TOKENS=MAX_TOKENS, ROWS=tile.rows, BLOCK=tile.block, STAGES=tile.num_stages,
    GATED=True, HAS_NORM=False, HAS_SCALE=False, HAS_BIAS=False, HAS_RESIDUAL=False, DEPENDENT=True,
)
names = _few_tokens.arg_names
numbers = {"x_stride": "i32", "num_tokens": "i32", "num_rows": "i32", "eps": "fp32"}
signature = {n: "constexpr" if n in constants else numbers.get(n, "*bf16") for n in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] == "*bf16"}
aligned[names.index("x_stride"),] = [["tt.divisibility", 16]]
source = triton.compiler.ASTSource(
    _few_tokens, signature, {(names.index(n),): value for n, value in constants.items()}, aligned
)
kernel = triton.compile(
    source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.num_warps}
)
assert 0 < kernel.metadata.shared <= SHARED_BYTES, kernel.metadata.shared
print("done")
"""


def test_the_tiles_of_several_tokens_fit_the_shared_memory_that_is_asked_for() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SHARED_PROGRAM], capture_output=True, text=True, check=False
    )
    assert result.stdout == "done\n", result.stderr
