"""What the engine decides from options, configuration and memory."""

import dataclasses
from pathlib import Path

import pytest
import torch

from services.worker.engine.kv.pool import fitting_pages
from services.worker.engine.models.config import ModelConfig
from services.worker.engine.models.registry import load_model_config
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.graphs import decode_graph_sizes
from services.worker.engine.runner.setup import (
    decide_attention_backend,
    decide_graph_sizes,
    decide_num_threads,
    decide_plan,
)
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


def backend_of(config: ModelConfig, device: str = "cuda", has: bool = True, **changes: object):
    return decide_attention_backend(
        options(**changes), config, torch.device(device), has_flashinfer=has
    )


def test_flashinfer_is_taken_where_it_can_run_the_model(config: ModelConfig) -> None:
    fitting = dataclasses.replace(config, head_dim=128)
    assert backend_of(fitting, dtype="bfloat16") == "flashinfer"
    assert backend_of(fitting, dtype="bfloat16", attention_backend="torch") == "torch"
    assert backend_of(fitting, "cpu", dtype="bfloat16") == "torch"


def test_triton_is_taken_where_flashinfer_cannot_be(config: ModelConfig) -> None:
    fitting = dataclasses.replace(config, head_dim=128)
    assert backend_of(fitting, dtype="float32") == "triton"
    assert backend_of(fitting, dtype="bfloat16", has=False) == "triton"
    assert backend_of(fitting, dtype="bfloat16", disable_flashinfer=True) == "triton"
    assert backend_of(fitting, dtype="bfloat16", attention_reduce_in_fp32=True) == "triton"
    assert backend_of(fitting, dtype="bfloat16", attention_backend="triton") == "triton"
    assert backend_of(config, dtype="bfloat16") == "triton"
    huge = dataclasses.replace(config, head_dim=512)
    assert backend_of(huge, dtype="bfloat16") == "torch"


def test_a_wish_for_triton_that_cannot_be_met_says_why(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="triton cannot be used: the device is cpu"):
        backend_of(config, "cpu", attention_backend="triton")
    huge = dataclasses.replace(config, head_dim=512)
    with pytest.raises(ValueError, match="head size 512 is above 256"):
        backend_of(huge, attention_backend="triton")


def test_a_wish_for_flashinfer_that_cannot_be_met_says_why(config: ModelConfig) -> None:
    fitting = dataclasses.replace(config, head_dim=128)
    wish = {"attention_backend": "flashinfer", "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="the device is cpu"):
        backend_of(fitting, "cpu", **wish)
    with pytest.raises(ValueError, match="not installed"):
        backend_of(fitting, has=False, **wish)
    with pytest.raises(ValueError, match="head size 16"):
        backend_of(config, **wish)
    with pytest.raises(ValueError, match="dtype"):
        backend_of(fitting, **{**wish, "dtype": "float32"})
    with pytest.raises(ValueError, match="disable_flashinfer is set"):
        backend_of(fitting, **wish, disable_flashinfer=True)
    with pytest.raises(ValueError, match="attention_reduce_in_fp32 is set"):
        backend_of(fitting, **wish, attention_reduce_in_fp32=True)


def test_decode_graphs_cover_the_running_sequences() -> None:
    assert decode_graph_sizes(1) == (1, 2, 4, 8)
    assert decode_graph_sizes(17) == (1, 2, 4, 8, 16, 24)
    assert decode_graph_sizes(256)[-2:] == (248, 256)
    assert decode_graph_sizes(1000)[-3:] == (480, 496, 512)


def test_graphs_need_a_backend_that_can_be_captured(config: ModelConfig) -> None:
    for backend in ("flashinfer", "triton"):
        assert decide_graph_sizes(options(), backend, 256)[:4] == (1, 2, 4, 8)
        assert decide_graph_sizes(options(disable_cuda_graph=True), backend, 256) == ()
    assert decide_graph_sizes(options(), "torch", 256) == ()
    assert plan_of(config, 10**9).graph_sizes == ()
