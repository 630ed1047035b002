"""Prefixes read once, against the torch backend: any groups, any page size, whole steps."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.page_lists import page_lists
from services.worker.engine.attention.sharing import PrefixGroups
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.kernels.merge import merge_attention
from services.worker.engine.kv.pool import PagePool
from tests.fakes.attention_steps import write_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HEAD_DIM = 128
LAYER = AttentionLayer(index=0, scale=HEAD_DIM**-0.5)
# bf16 has 8 bits; the two parts of an output are rounded before they are merged.
TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}


@dataclass
class Sharing:
    """Rows over one pool of random keys and values, some of which share their first pages."""

    num_heads: int
    num_kv_heads: int
    page_size: int
    max_len: int
    num_rows: int

    def __post_init__(self) -> None:
        max_pages = -(-self.max_len // self.page_size)
        self.table = np.arange(self.num_rows * max_pages, dtype=np.int32)
        self.table = self.table.reshape(self.num_rows, max_pages)
        self.pool = PagePool(
            num_layers=1,
            num_pages=self.table.size,
            page_size=self.page_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        )
        self.pool.tensor.normal_()

    def share(self, groups: list[tuple[int, int, int]]) -> PrefixGroups:
        """Groups of (first row, number of rows, pages), which share from here on."""
        for first, count, num_pages in groups:
            self.table[first : first + count, :num_pages] = self.table[first, :num_pages]
        columns = np.array(groups, np.intp).reshape(-1, 3)
        return PrefixGroups(columns[:, 0], columns[:, 1], columns[:, 2])

    def inputs(
        self, slots: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray | None = None
    ) -> AttentionInputs:
        if num_tokens is None:
            num_tokens = np.ones(len(slots), np.int32)
        return AttentionInputs(
            slots=slots.astype(np.int32),
            num_tokens=num_tokens.astype(np.int32),
            start_positions=starts.astype(np.int32),
            host_page_table=self.table,
            page_table=torch.from_numpy(self.table).cuda(),
        )

    def packed(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, views of one tensor."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        whole = torch.randn(num_tokens, sum(heads), HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        return whole.split(heads, dim=1)

    def expected(self, inputs: AttentionInputs, packed: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the torch backend gives; the pool has the step's keys and values then."""
        q, k, v = packed
        write_step(self.pool, inputs, LAYER, k, v)
        reference = TorchAttention(self.pool)
        reference.plan(inputs)
        return reference.run(q, LAYER)


def random_groups(
    random: np.random.Generator, num_rows: int, max_pages: int
) -> list[tuple[int, int, int]]:
    """Disjoint groups with rows between them or not."""
    groups, row = [], int(random.integers(0, 3))
    while row + 2 <= num_rows:
        count = min(int(random.integers(2, 8)), num_rows - row)
        groups.append((row, count, int(random.integers(1, max_pages))))
        row += count + int(random.choice([0, 0, 1, 4]))
    return groups


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 8), (14, 2), (5, 1)])
def test_two_passes_and_a_merge_equal_one_pass(
    num_heads: int, num_kv_heads: int, page_size: int
) -> None:
    calls = pytest.importorskip("services.worker.engine.attention.flashinfer_decode")
    random = np.random.default_rng(page_size)
    torch.manual_seed(page_size)
    num_rows, max_len = 23, 900
    workspace = torch.zeros(128 * 1024**2, dtype=torch.uint8, device="cuda")
    shape = {
        "num_qo_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": HEAD_DIM,
        "page_size": page_size,
        "q_data_type": torch.bfloat16,
        "kv_data_type": torch.bfloat16,
    }
    decode = calls.DecodeCalls(workspace, shape)
    cascade = calls.CascadeCalls(workspace, decode, shape)
    for round_number in range(5):
        rows = Sharing(num_heads, num_kv_heads, page_size, max_len, num_rows)
        chosen = random_groups(random, num_rows, max_len // page_size - 1)
        groups = rows.share(chosen or [(0, 2, 1)])
        # From a row's own token being the first after the prefix to the longest there can be.
        least = groups.pages_by_row(num_rows) * page_size
        starts = least if round_number == 0 else random.integers(least, max_len)
        inputs = rows.inputs(np.arange(num_rows), starts)
        packed = rows.packed(num_rows)
        expected = rows.expected(inputs, packed)
        kv = (rows.pool.keys(0), rows.pool.values(0))
        for call in (
            cascade.plan(inputs, num_rows, groups),
            decode.plan(page_lists(inputs, slice(0, num_rows), page_size)),
        ):
            out = torch.full_like(expected, torch.nan)
            call.run(packed[0], kv, out=out)
            torch.testing.assert_close(out, expected, **TOLERANCE)


def make_backend(rows: Sharing):  # type: ignore[no-untyped-def]
    module = pytest.importorskip("services.worker.engine.attention.flashinfer_backend")
    triton = pytest.importorskip("services.worker.engine.attention.triton_backend")
    return module.FlashInferAttention(
        rows.pool,
        num_heads=rows.num_heads,
        others=triton.TritonAttention(
            rows.pool,
            num_heads=rows.num_heads,
            max_rows=rows.num_rows,
            dtype=rows.pool.tensor.dtype,
        ),
        has_other_layers=False,
    )


def long_prefixes() -> Sharing:
    """44 rows: 18 and 15 share 3,200 tokens, the others nothing."""
    torch.manual_seed(1)
    rows = Sharing(num_heads=32, num_kv_heads=8, page_size=16, max_len=3400, num_rows=44)
    rows.share([(2, 18, 200), (20, 15, 200)])
    return rows


def test_mixed_steps_read_long_prefixes_once() -> None:
    rows = long_prefixes()
    backend = make_backend(rows)
    random = np.random.default_rng(2)
    # Rows 40 and up prefill, two of them over the pages of one group.
    rows.table[40:42, :200] = rows.table[2, :200]
    for _ in range(3):
        starts = random.integers(3210, 3380, 44)
        starts[40:42], starts[42:] = 3200, 0
        num_tokens = np.ones(44, np.int32)
        num_tokens[40:] = [17, 2, 130, 64]
        inputs = rows.inputs(np.arange(44), starts, num_tokens)
        single = slice(0, 40)
        assert backend.wants_eager(
            inputs.slots[single], inputs.start_positions[single], inputs.host_page_table
        )
        packed = rows.packed(int(num_tokens.sum()))
        expected = rows.expected(inputs, packed)
        backend.plan(inputs)
        torch.testing.assert_close(backend.run(packed[0], LAYER), expected, **TOLERANCE)


def test_steps_issued_before_the_last_ones_ran_do_not_disturb_them() -> None:
    rows = long_prefixes()
    backend = make_backend(rows)
    steps = []
    for number in range(8):
        # Rows leave now and then, so that the groups are sometimes the last step's.
        slots = np.arange(number // 3, 40)
        inputs = rows.inputs(slots, np.full(len(slots), 3220 + 3 * number))
        packed = rows.packed(len(slots))
        steps.append((inputs, packed, rows.expected(inputs, packed)))
    torch.cuda.synchronize()
    got = []
    for number, (inputs, packed, _) in enumerate(steps):
        if number % 2 == 0:
            # Two steps are in flight at most.
            torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)
        single = (inputs.slots, inputs.start_positions, inputs.host_page_table)
        assert backend.wants_eager(*single)
        backend.plan(inputs)
        got.append(backend.run(packed[0], LAYER))
    for out, (_, _, expected) in zip(got, steps, strict=True):
        torch.testing.assert_close(out, expected, **TOLERANCE)


def test_rows_that_share_little_are_left_to_the_graphs() -> None:
    rows = Sharing(num_heads=32, num_kv_heads=8, page_size=16, max_len=1800, num_rows=6)
    rows.share([(0, 4, 100)])
    backend = make_backend(rows)
    inputs = rows.inputs(np.arange(6), np.full(6, 1700))
    assert not backend.wants_eager(inputs.slots, inputs.start_positions, rows.table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_outputs_are_those_over_both_sets_of_keys(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for num_rows, num_heads, size in ((1, 5, 64), (300, 32, 128), (7, 9, 96), (13, 14, 256)):
        own, shared = torch.randn(2, num_rows, num_heads, size, device="cuda")
        own_lse, shared_lse = 5 * torch.randn(2, num_rows, num_heads, device="cuda")
        shared_lse[0], shared[0] = -torch.inf, torch.nan
        share = torch.sigmoid((shared_lse - own_lse) * np.log(2))[..., None]
        expected = own + share * (shared.nan_to_num() - own)
        out = own.to(dtype)
        merge_attention(out, own_lse, shared.to(dtype), shared_lse)
        torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=1e-2)
