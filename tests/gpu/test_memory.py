"""What is measured at start is what steps take: later ones take nothing more."""

import gc
from typing import Any

import pytest
import torch

from services.common.model_files import builtin_model_path
from services.worker.engine.batch import Runner
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner
from services.worker.engine.runner.memory import ModelTooLargeError
from services.worker.engine.runner.profile import run_largest_steps, run_steps_of_all_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def build(**changes: Any) -> tuple[Runner, EnginePlan]:
    path = builtin_model_path()
    options = {"model_path": path, "tokenizer_path": path, "device": "cuda", **changes}
    return build_runner(EngineOptions(**options), lambda fraction, what: None)


@pytest.fixture(autouse=True)
def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_all_sizes_fit_beside_a_pool_of_all_that_is_left(dtype: str) -> None:
    runner, plan = build(dtype=dtype, max_running_sequences=64)
    free_after_start, total = torch.cuda.mem_get_info()
    assert free_after_start < total // 10, "the pool did not take what was left"
    run_steps_of_all_sizes(runner, plan)
    run_largest_steps(runner, plan)
    free, _ = torch.cuda.mem_get_info()
    assert free >= free_after_start - 64 * 1024**2, "steps took memory that was not taken at start"
    runner.close()


def test_a_share_too_small_for_one_sequence_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ModelTooLargeError, match=r"GiB are missing.*a larger --mem-fraction"):
        build(mem_fraction_static=0.0001)


def test_more_tokens_than_fit_are_refused() -> None:
    with pytest.raises(ModelTooLargeError, match="tokens of --max-total-tokens"):
        build(num_pages=10**8)


def test_a_share_is_kept() -> None:
    before, _ = torch.cuda.mem_get_info()
    runner, plan = build(mem_fraction_static=0.3)
    after, _ = torch.cuda.mem_get_info()
    assert before - after > 0.25 * before
    # Steps, graphs and kernels come on top of weights and pool.
    assert before - after < 0.4 * before
    runner.close()
