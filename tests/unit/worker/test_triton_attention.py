"""The arithmetic of the Triton backend, in Triton's interpreter, against the torch backend."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from services.worker.engine.attention.backend import AttentionLayer
from services.worker.engine.attention.triton_backend import TritonAttention
from services.worker.engine.kernels import paged_decode
from tests.fakes.attention_steps import AttentionSteps

torch.set_num_threads(1)
# The CPU has no processors to fill, so that rows would not be cut in parts.
paged_decode._PROGRAMS_PER_PROCESSOR = 40
BOUNDS = {torch.float32: 5e-6, torch.float16: 3e-3}
SHAPES = [
    # query heads, key/value heads, head size, page size, type
    (4, 2, 64, 16, torch.float32),
    (5, 1, 24, 1, torch.float16),
    (40, 1, 16, 32, torch.float32),
]
LAYERS = [dict(), dict(sliding_window=30), dict(sliding_window=1, soft_cap=9.0)]

for heads, kv_heads, size, page_size, dtype in SHAPES:
    for exact in (False, True):
        steps = AttentionSteps(
            lambda pool, heads, rows: TritonAttention(
                pool, num_heads=heads, max_rows=rows, dtype=dtype, reduce_in_fp32=exact
            ),
            num_heads=heads, num_kv_heads=kv_heads, head_dim=size, page_size=page_size,
            dtype=dtype, device="cpu", num_slots=3, max_len=140, seed=size,
        )
        for index, changes in enumerate(LAYERS[:1] if exact else LAYERS):
            layer = AttentionLayer(index=index % 2, scale=(index + 1) * size**-0.5, **changes)
            worst = max(
                steps.worst_error(steps.mixed(1, [13, 5]), layer),
                steps.worst_error(steps.mixed(0, [7]), layer),
                steps.worst_error(steps.inputs([1, 1, 1], [0, 64, 139]), layer, captured=True),
            )
            assert worst < BOUNDS[dtype], (heads, kv_heads, size, page_size, exact, changes, worst)
"""


def test_steps_equal_the_torch_backends() -> None:
    pytest.importorskip("triton")
    # The interpreter must be chosen before the kernels' modules are imported.
    done = subprocess.run(
        ["env", "TRITON_INTERPRET=1", sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
