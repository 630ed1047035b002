"""Keys and values in FP8: what the pool holds, and attention over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.worker.engine.kv.pool import PagePool, gather_pages, write_tokens
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from services.worker.engine.runner.precision import decide_kv_cache_dtype
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.engines import open_driver

FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, "Llama")
    return path


def make_pool(dtype: torch.dtype) -> PagePool:
    return PagePool(
        num_layers=1,
        num_pages=6,
        page_size=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_tokens_come_back_rounded_from_their_places(dtype: torch.dtype) -> None:
    pages = make_pool(dtype).keys(0)
    tokens = torch.randn(5, 2, 8)
    locations = torch.tensor([3, 0, 23, 8, 9])
    write_tokens(pages, locations, tokens)
    gathered = gather_pages(pages, torch.arange(6), torch.float32)
    expected = torch.zeros(24, 2, 8)
    expected[locations] = tokens.to(dtype).float()
    assert torch.equal(gathered, expected.view(6, 4, 2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, *FP8_DTYPES])
def test_tokens_without_a_place_are_not_written(dtype: torch.dtype) -> None:
    pages = make_pool(dtype).keys(0)
    write_tokens(pages, torch.tensor([3, 17]), torch.ones(5, 2, 8))
    written = gather_pages(pages, torch.arange(6), torch.float32).flatten(0, 1).flatten(1)
    assert written.any(1).nonzero().flatten().tolist() == [3, 17]


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_what_is_too_large_becomes_the_largest(dtype: torch.dtype) -> None:
    pages = make_pool(dtype).values(0)
    write_tokens(
        pages, torch.tensor([0, 1]), torch.tensor([1e6, -1e6])[:, None, None].expand(2, 2, 8)
    )
    gathered = gather_pages(pages, torch.tensor([0]), torch.float32)[0, :2, 0, 0]
    largest = torch.finfo(dtype).max
    assert gathered.tolist() == [largest, -largest]


@pytest.mark.parametrize(
    ("wish", "dtype"),
    [("auto", "bfloat16"), ("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")],
)
def test_names_of_formats(wish: str, dtype: str) -> None:
    options = EngineOptions(model_path=Path("m"), tokenizer_path=Path("t"), kv_cache_dtype=wish)
    assert decide_kv_cache_dtype(options, "bfloat16") == dtype


def test_a_pool_of_half_the_bytes_holds_twice_the_tokens(model_path: Path) -> None:
    pages = {}
    for wish in ("auto", "fp8_e4m3"):
        options = EngineOptions(
            model_path=model_path,
            tokenizer_path=model_path,
            device="cpu",
            dtype="bfloat16",
            kv_cache_dtype=wish,
        )
        runner, plan = build_runner(options, lambda *_: None)
        runner.close()
        pages[wish] = plan.num_pages
    # Free memory is measured anew for each, and capped.
    assert pages["fp8_e4m3"] == pytest.approx(2 * pages["auto"], rel=0.2)


@pytest.mark.parametrize("wish", ["fp8_e4m3", "fp8_e5m2"])
def test_batches_and_chunks_do_not_change_a_sequence(model_path: Path, wish: str) -> None:
    """Every token sees the rounded keys and values of all before it, its own step's included."""
    prompts = [[5, 9, 40, 2, 77, 3, 8, 8, 1, 90], [7, 7, 7], [33, 2, 1, 6, 60]]
    alone = []
    for prompt in prompts:
        driver = open_driver(model_path, kv_cache_dtype=wish)
        alone.append(driver.generate([driver.start(prompt)], 10)[0])
    for chunk in (1, 3, 100):
        driver = open_driver(model_path, kv_cache_dtype=wish)
        sequences = [driver.start(prompt) for prompt in prompts]
        assert driver.generate(sequences, 10, chunk=chunk) == alone
