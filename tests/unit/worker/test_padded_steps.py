"""Steps padded for captures against the same steps without padding, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.engine.attention.backend import AttentionInputs, AttentionLayer
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.batch import StepPlan
from services.worker.engine.distributed.group import SoloGroup
from services.worker.engine.kv.pool import PagePool, StepPlaces
from services.worker.engine.models.decoder import Decoder
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.inputs import (
    PACKED_ROWS,
    SlotTables,
    padded_view,
    padding_only,
)
from services.worker.engine.runner.setup import load_model
from tests.fakes.checkpoints import write_checkpoint

NUM_SLOTS, NUM_PAGES, PAGE = 3, 12, 4
CPU = torch.device("cpu")


@dataclass
class Between:
    """Attends for the step's own tokens, as between captured pieces; padding finds anything."""

    backend: TorchAttention
    num_tokens: int

    def plan(self, inputs: AttentionInputs) -> None:
        self.backend.plan(inputs)

    def run(
        self, q: torch.Tensor, layer: AttentionLayer, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        attended = torch.full(q.shape, 7.0)
        self.backend.run(q[: self.num_tokens], layer, attended[: self.num_tokens])
        return attended


class Side:
    """A model's tables and pool."""

    def __init__(self, model: Decoder, row_sizes: tuple[int, ...] = ()) -> None:
        self.model = model
        config = model.config
        self.pool = PagePool(
            num_layers=config.num_layers,
            num_pages=NUM_PAGES + 1,
            page_size=PAGE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        self.tables = SlotTables(
            num_slots=NUM_SLOTS,
            max_pages=4,
            page_size=PAGE,
            padding_page=NUM_PAGES,
            device=CPU,
            row_sizes=row_sizes,
        )
        self.backend = TorchAttention(self.pool)

    def plain(self, plan: StepPlan) -> torch.Tensor:
        inputs = self.tables.prepare(plan)
        self.backend.plan(inputs.attention)
        places = StepPlaces(self.pool, inputs.locations)
        hidden = self.model.forward(inputs.token_ids, inputs.positions, places, self.backend)
        return hidden[: len(plan.token_ids)]

    def padded(self, plan: StepPlan, buffer: torch.Tensor, width: int) -> torch.Tensor:
        """With what a capture of `width` tokens reads."""
        backend = Between(self.backend, len(plan.token_ids))
        inputs = self.tables.prepare_padded(plan, buffer, width)
        backend.plan(inputs.attention)
        token_ids, _, positions, locations = padded_view(buffer, width)
        places = StepPlaces(self.pool, locations)
        return self.model.forward(token_ids, positions, places, backend)[: len(plan.token_ids)]

    def captured(self, plan: StepPlan, packed: torch.Tensor) -> torch.Tensor:
        """A step of rows with one token, as a decode graph's."""
        inputs = self.tables.prepare_captured(plan, packed)
        self.backend.plan(inputs.attention)
        places = StepPlaces(self.pool, packed[3])
        return self.model.forward(packed[0], packed[2], places, self.backend)[: len(plan.slots)]


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, request.param)
    options = EngineOptions(model_path=path, tokenizer_path=path, device="cpu", dtype="float32")
    return load_model(
        options,
        load_model_config(path),
        device=CPU,
        group=SoloGroup(),
        on_progress=lambda _: None,
    )


def steps(rows: list[tuple[int, int]]) -> Iterator[StepPlan]:
    """Steps of rows (slot, tokens), one after the other; slots have pages of their own."""
    random = np.random.default_rng(0)
    starts = np.zeros(NUM_SLOTS, np.int32)
    pages = random.permutation(NUM_PAGES).reshape(NUM_SLOTS, -1).astype(np.int32)
    slots, indices = np.indices(pages.shape, np.int32)
    changes = (slots.ravel(), indices.ravel(), pages.ravel())
    for step in rows:
        own = np.array([slot for slot, _ in step], np.int32)
        num_tokens = np.array([count for _, count in step], np.int32)
        yield StepPlan(
            step_number=0,
            slots=own,
            num_tokens=num_tokens,
            start_positions=starts[own],
            token_ids=random.integers(0, 90, num_tokens.sum()).astype(np.int32),
            sample_rows=np.arange(len(own), dtype=np.int32),
            page_slots=changes[0],
            page_indices=changes[1],
            page_ids=changes[2],
        )
        starts[own] += num_tokens


MIXED = [[(2, 9), (0, 3)], [(0, 1), (2, 1), (1, 6)], [(1, 1)], [(0, 1), (2, 1), (1, 5)]]


@torch.inference_mode()
def test_padding_changes_neither_hidden_states_nor_anybodys_keys(model: Decoder) -> None:
    plain, padded = Side(model), Side(model)
    buffer = torch.zeros(PACKED_ROWS * 16 + 2 * NUM_SLOTS, dtype=torch.int64)
    for plan, width in zip(steps(MIXED), (16, 8, 4, 16), strict=True):
        torch.testing.assert_close(padded.padded(plan, buffer, width), plain.plain(plan))
        torch.testing.assert_close(
            padded.pool.tensor[:, :, :NUM_PAGES], plain.pool.tensor[:, :, :NUM_PAGES]
        )
    assert not plain.pool.tensor[:, :, NUM_PAGES].any()


@torch.inference_mode()
def test_padding_rows_of_decode_steps_change_nobodys_keys(model: Decoder) -> None:
    plain, padded = Side(model), Side(model)
    packed = torch.zeros(PACKED_ROWS, 8, dtype=torch.int64)
    for plan in steps([[(2, 1), (0, 1)], [(1, 1), (0, 1), (2, 1)], [(1, 1)]]):
        torch.testing.assert_close(padded.captured(plan, packed), plain.plain(plan))
        torch.testing.assert_close(
            padded.pool.tensor[:, :, :NUM_PAGES], plain.pool.tensor[:, :, :NUM_PAGES]
        )


def test_a_step_of_padding_only_goes_to_the_padding_page(model: Decoder) -> None:
    side = Side(model)
    buffer = torch.zeros(PACKED_ROWS * 8 + 2 * NUM_SLOTS, dtype=torch.int64)
    inputs = side.tables.prepare_padded(padding_only(), buffer, 8)
    assert (inputs.locations // PAGE == NUM_PAGES).all()
    assert inputs.locations.data_ptr() == padded_view(buffer, 8)[3].data_ptr()


def test_rows_that_sample_are_padded_to_the_next_size(model: Decoder) -> None:
    plain, padded = Side(model), Side(model, row_sizes=(2, 4))
    buffer = torch.zeros(PACKED_ROWS * 16 + 2 * NUM_SLOTS + 1, dtype=torch.int64)
    for plan, num_sampled in zip(steps(MIXED), (2, 4, 2, 4), strict=True):
        expected = plain.tables.prepare(plan)
        for inputs in (
            padded.tables.prepare(plan),
            padded.tables.prepare_padded(plan, buffer, 16),
        ):
            assert inputs.sample_tokens is not None
            assert len(inputs.sample_tokens) == num_sampled
            lasts = plan.num_tokens.cumsum() - 1
            assert inputs.sample_tokens[: len(lasts)].tolist() == lasts.tolist()
            assert inputs.sampled_slots.tolist() == expected.sampled_slots.tolist()
