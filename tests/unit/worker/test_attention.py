"""The torch backend against attention written out token by token."""

import math

import numpy as np
import pytest
import torch

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.kv.pool import PagePool
from tests.fakes.attention_steps import write_step

PAGE, HEADS, KV_HEADS, DIM, PAGES = 4, 6, 2, 8, 256


class Harness:
    """Sequences of random queries, keys and values over shuffled pages."""

    def __init__(
        self,
        lengths: list[int],
        *,
        dtype: torch.dtype = torch.float32,
        reduce_in_fp32: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pool = PagePool(
            num_layers=2,
            num_pages=PAGES,
            page_size=PAGE,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        # What was never written must not count, whatever it is.
        self.pool.tensor.fill_(1e4)
        self.backend = TorchAttention(self.pool, reduce_in_fp32=reduce_in_fp32)

        def random(heads: int) -> list[torch.Tensor]:
            return [torch.randn(n, heads, DIM, generator=generator).to(dtype) for n in lengths]

        self.q, self.k, self.v = random(HEADS), random(KV_HEADS), random(KV_HEADS)
        width = -(-max(lengths) // PAGE)
        pages = torch.randperm(PAGES, generator=generator)[: len(lengths) * width]
        self.page_table = pages.view(len(lengths), width).to(torch.int32)

    def run(self, work: list[tuple[int, int, int]], layer: AttentionLayer) -> list[torch.Tensor]:
        """Rows (sequence, start, stop) in one step."""
        q, k, v = (
            torch.cat([each[slot][start:stop] for slot, start, stop in work])
            for each in (self.q, self.k, self.v)
        )
        write_step(self.pool, self.plan(work), layer, k, v)
        out = self.backend.run(q, layer)
        return list(out.split([stop - start for _, start, stop in work]))

    def plan(self, work: list[tuple[int, int, int]]) -> AttentionInputs:
        inputs = AttentionInputs(
            slots=np.array([slot for slot, _, _ in work], np.int32),
            num_tokens=np.array([stop - start for _, start, stop in work], np.int32),
            start_positions=np.array([start for _, start, _ in work], np.int32),
            host_page_table=self.page_table.numpy(),
            page_table=self.page_table,
        )
        self.backend.plan(inputs)
        return inputs

    def expected(self, slot: int, start: int, stop: int, layer: AttentionLayer) -> torch.Tensor:
        rows = []
        for position in range(start, stop):
            first = 0 if layer.sliding_window is None else position - layer.sliding_window + 1
            seen = slice(max(0, first), position + 1)
            heads = []
            for head in range(HEADS):
                kv_head = head * KV_HEADS // HEADS
                keys, values = (each[slot][seen, kv_head].float() for each in (self.k, self.v))
                scores = keys @ self.q[slot][position, head].float() * layer.scale
                if layer.soft_cap is not None:
                    scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
                heads.append(scores.softmax(0) @ values)
            rows.append(torch.stack(heads))
        return torch.stack(rows)


LAYERS = [
    AttentionLayer(index=1, scale=1 / math.sqrt(DIM)),
    AttentionLayer(index=0, scale=0.5, sliding_window=5),
    AttentionLayer(index=1, scale=0.3, sliding_window=1),
    AttentionLayer(index=0, scale=0.7, soft_cap=2.0),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_prefill_chunks_and_decode_in_one_step_attend_causally(layer: AttentionLayer) -> None:
    harness = Harness([23, 150, 9, 40, 17])
    # Two prompts are partly in place; then mixed rows of chunks and single tokens.
    harness.run([(0, 0, 22), (1, 0, 7), (3, 0, 39), (4, 0, 16)], layer)
    work = [(0, 22, 23), (1, 7, 150), (2, 0, 9), (3, 39, 40), (4, 16, 17)]
    for row, out in zip(work, harness.run(work, layer), strict=True):
        torch.testing.assert_close(out, harness.expected(*row, layer), atol=1e-5, rtol=1e-4)


def test_probabilities_in_float32_leave_the_outputs_rounding_only() -> None:
    excess = {}
    for in_fp32 in (False, True):
        harness = Harness([150, 40], dtype=torch.bfloat16, reduce_in_fp32=in_fp32)
        rows = [(0, 0, 150), (1, 0, 40)]
        error = torch.zeros(())
        for row, out in zip(rows, harness.run(rows, LAYERS[1]), strict=True):
            expected = harness.expected(*row, LAYERS[1])
            rounding = expected.abs() * 2**-8
            error = torch.maximum(error, ((out.float() - expected).abs() - rounding).max())
        excess[in_fp32] = error.item()
    assert excess[True] < 1e-5
    assert excess[False] > 1e-4


def test_rows_of_one_step_may_share_pages() -> None:
    layer = LAYERS[0]
    harness = Harness([12, 12])
    harness.page_table[1, :2] = harness.page_table[0, :2]
    for tensors in (harness.q, harness.k, harness.v):
        tensors[1][:8] = tensors[0][:8]
    first, second = harness.run([(0, 0, 12), (1, 8, 12)], layer)
    torch.testing.assert_close(first, harness.expected(0, 0, 12, layer), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, harness.expected(1, 8, 12, layer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_a_decode_row_has_the_same_bits_in_any_batch(window: int | None) -> None:
    layer = AttentionLayer(index=0, scale=0.5, sliding_window=window)
    lengths = [3, 9, 17, 33, 90, 91, 92, 5, 31, 64]
    harness = Harness(lengths)
    harness.run([(slot, 0, n - 1) for slot, n in enumerate(lengths)], layer)
    rows = [(slot, n - 1, n) for slot, n in enumerate(lengths)]
    together = harness.run(rows, layer)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(harness.run([row], layer)[0], out)


def test_many_long_decode_rows_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS[0]
    lengths = [40, 39, 38, 40, 37]
    harness = Harness(lengths)
    harness.run([(slot, 0, n - 1) for slot, n in enumerate(lengths)], layer)
    rows = [(slot, n - 1, n) for slot, n in enumerate(lengths)]
    whole = harness.run(rows, layer)
    module = "services.worker.engine.attention.torch_backend._GATHERED_TOKENS"
    monkeypatch.setattr(module, 100)
    for expected, out in zip(whole, harness.run(rows, layer), strict=True):
        assert torch.equal(out, expected)


def test_padding_beyond_the_planned_tokens_is_zero() -> None:
    harness = Harness([6])
    expected = harness.run([(0, 0, 6)], LAYERS[0])[0]
    harness.plan([(0, 4, 5)])
    out = harness.backend.run(harness.q[0][4:6], LAYERS[0])
    torch.testing.assert_close(out[0], expected[4])
    assert (out[1] == 0).all()
