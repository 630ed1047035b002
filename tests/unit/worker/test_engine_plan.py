"""What the engine decides from options, configuration and memory."""

from pathlib import Path

import pytest
import torch

from services.worker.engine.kv.pool import fitting_pages
from services.worker.engine.models.config import ModelConfig
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.setup import decide_num_threads, decide_plan
from tests.fakes.checkpoints import write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, "Llama", rope_scaling={"rope_type": "linear", "factor": 3.0})
    return load_model_config(path)


def options(**changes: object) -> EngineOptions:
    return EngineOptions(
        **{"model_path": Path("m"), "tokenizer_path": Path("t"), "page_size": 16, **changes}
    )


def plan_of(config: ModelConfig, budget: int, device: torch.device = CPU, **changes: object):
    return decide_plan(
        options(**changes), config, device=device, eos_token_ids=(1,), pool_budget_bytes=budget
    )


def test_pages_fill_the_budget(config: ModelConfig) -> None:
    # Keys and values of 3 layers, 16 tokens, 2 heads of 16 in float32.
    page = 2 * 3 * 16 * 2 * 16 * 4
    assert plan_of(config, 10 * page).num_pages == 10
    assert plan_of(config, 11 * page - 1).num_pages == 10


def test_ranks_hold_their_share_of_heads(config: ModelConfig) -> None:
    whole = plan_of(config, 10**6).num_pages
    assert plan_of(config, 10**6, tp_size=2).num_pages == pytest.approx(2 * whole, abs=1)
    # Two key/value heads cannot be divided by four: each rank holds one.
    assert plan_of(config, 10**6, tp_size=4).num_pages == pytest.approx(2 * whole, abs=1)


def test_no_room_for_a_page_is_an_error(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="no room for keys and values"):
        plan_of(config, 100)
    with pytest.raises(ValueError, match="0 are free"):
        fitting_pages(free_bytes=-5, bytes_per_page=4)


def test_given_pages_win(config: ModelConfig) -> None:
    assert plan_of(config, 0, num_pages=7).num_pages == 7


def test_a_sequence_is_never_longer_than_the_pool(config: ModelConfig) -> None:
    assert plan_of(config, 10**9).context_length == 256
    assert plan_of(config, 0, num_pages=7).context_length == 7 * 16


def test_a_stretched_context_is_used_on_request_only(config: ModelConfig) -> None:
    assert plan_of(config, 10**9, context_length=700).context_length == 700


def test_the_type_follows_the_device(config: ModelConfig) -> None:
    assert plan_of(config, 10**9).dtype == "float32"
    assert plan_of(config, 10**9, dtype="bfloat16").dtype == "bfloat16"


def test_threads_follow_the_weights() -> None:
    mebibyte = 1024**2
    assert decide_num_threads(17 * mebibyte, 16, 1) == 1
    assert decide_num_threads(300 * mebibyte, 16, 1) == 4
    assert decide_num_threads(8192 * mebibyte, 16, 1) == 16
    assert decide_num_threads(8192 * mebibyte, 16, 4) == 4
    assert decide_num_threads(8192 * mebibyte, 1, 2) == 1
