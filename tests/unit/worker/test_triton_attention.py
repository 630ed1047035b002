"""The arithmetic of the Triton backend, in Triton's interpreter, against the torch backend."""

import subprocess
import sys

import numpy as np
import pytest
import torch

PROGRAM = """
import torch
from services.worker.engine.attention.backend import AttentionLayer
from services.worker.engine.attention.triton_backend import TritonAttention
from services.worker.engine.kernels import paged_decode
from tests.fakes.attention_steps import AttentionSteps

torch.set_num_threads(1)
# The CPU has no processors to fill, so that rows would not be cut in parts.
paged_decode._PROGRAMS_OF_FEW, paged_decode._PROGRAMS_OF_MANY = 40, 12
paged_decode._FEW_ROWS = 2
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


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 64, 512])
def test_parts_cover_every_row_and_the_longest_come_first(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged_decode = pytest.importorskip("services.worker.engine.kernels.paged_decode")
    monkeypatch.setattr(paged_decode, "_PROGRAMS_OF_FEW", 132)
    monkeypatch.setattr(paged_decode, "_PROGRAMS_OF_MANY", 264)
    decode = paged_decode.PagedDecode(
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        page_size=16,
        max_rows=num_rows,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        weight_parts=1,
    )
    random = np.random.default_rng(num_rows)
    for longest in (40, 3000):
        slots = random.permutation(num_rows).astype(np.int32)
        positions = random.integers(0, longest, num_rows).astype(np.int32)
        positions[0] = 20_000
        parts = decode.list_parts(slots, positions, padded=True)
        assert parts.shape == (decode.most_parts(num_rows), paged_decode.PART_FIELDS)
        listed = parts[parts[:, 3] < parts[:, 4]]
        assert np.array_equal(listed, decode.list_parts(slots, positions))
        rows, numbers, counts, firsts = listed[:, 0], listed[:, 3], listed[:, 4], listed[:, 5]
        assert np.array_equal(listed[:, 1], slots[rows])
        assert np.array_equal(listed[:, 2], positions[rows])
        # Every part of every row once, each with a place of its own.
        assert np.array_equal(np.bincount(rows, minlength=num_rows)[rows], counts)
        assert len(set(zip(rows.tolist(), numbers.tolist(), strict=True))) == len(listed)
        assert sorted((firsts + numbers).tolist()) == list(range(len(listed)))
        assert (np.diff((positions[rows] + 1) // counts) <= 0).all()
        # The one long row does not outlast the others: its parts are not much longer than a
        # program's share of all keys, unless there would be more than 32.
        share = -(-int((positions + 1).sum()) // ((132 if num_rows <= 16 else 264) // 2))
        count = counts[rows == 0][0]
        assert count == 32 or 20_001 / count <= 1.5 * max(share, 64)
