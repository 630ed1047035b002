"""Random traffic over the built-in model on a GPU: nothing leaks, and every token is right.

`SOAK_SECONDS=300 pytest tests/gpu/test_soak.py` for minutes of it.
"""

import gc
import random
from typing import Any

import pytest
import torch

from services.common.model_files import builtin_model_path
from services.worker.engine.batch import Runner
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner
from tests.fakes.soak import Soak, soak_seconds

SECONDS = soak_seconds(10.0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(120 + 10 * SECONDS),
]


def build(**changes: Any) -> tuple[Runner, EnginePlan]:
    path = builtin_model_path()
    options = EngineOptions(model_path=path, tokenizer_path=path, device="cuda", **changes)
    return build_runner(options, lambda fraction, what: None)


def soaked(dtype: str) -> Soak:
    runner, plan = build(
        dtype=dtype, num_pages=40, chunked_prefill_size=64, max_running_sequences=16
    )
    soak = Soak(runner, plan, random.Random(dtype))
    soak.run(SECONDS / 4)
    gc.collect()
    reserved = torch.cuda.memory_reserved()
    soak.run(SECONDS * 3 / 4)
    assert torch.cuda.memory_reserved() <= reserved + 64 * 1024**2, "the device's memory grew"
    soak.check()
    runner.close()
    return soak


def test_random_traffic_in_float32_leaks_nothing_and_changes_no_token() -> None:
    soak = soaked("float32")
    runner, plan = build(dtype="float32", num_pages=64)
    soak.check_against_alone(runner, plan.page_size)
    runner.close()


def test_random_traffic_in_bf16_leaks_nothing() -> None:
    pytest.importorskip("flashinfer")
    soaked("bfloat16")
