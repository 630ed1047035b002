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
        (1, torch.bfloat16, 1e-2), (1, torch.float16, 1e-3), (2 + seed, torch.float16, 1e-3)
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
